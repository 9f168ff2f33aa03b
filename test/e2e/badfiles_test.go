package e2e_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// fdArgs are for passFDs.
type fdArgs struct {
	Sock string
	// Login is written before, without files.
	Login []byte
	Data  []byte
	// Files is how many go with Data, of Kind.
	Files int
	Kind  string
	Times int
	// Read waits for an answer before the connection is closed, ToEnd for its
	// end.
	Read, ToEnd bool
}

// strange makes files to pass: of all kinds, and such as are slow to close.
func strange(kind string) (fd int, keep func(), err error) {
	keep = func() {}
	switch kind {
	case "null":
		fd, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	case "dgram", "stream", "seqpacket":
		typ := map[string]int{"dgram": unix.SOCK_DGRAM, "stream": unix.SOCK_STREAM, "seqpacket": unix.SOCK_SEQPACKET}[kind]
		var p [2]int
		p, err = unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "listening":
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{}), unix.Listen(fd, 1))
		}
	case "epoll":
		fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	case "pipe":
		var p [2]int
		err = unix.Pipe2(p[:], unix.O_CLOEXEC)
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "eventfd":
		fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	case "pidfd":
		fd, err = unix.PidfdOpen(os.Getpid(), 0)
	case "directory":
		fd, err = unix.Open("/proc", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	case "path":
		fd, err = unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	case "udp":
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	case "full of itself":
		// A pair with a message in it that holds both ends: only the kernel's
		// garbage collector gets rid of that.
		var p [2]int
		if p, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = unix.Sendmsg(p[1], []byte{0}, unix.UnixRights(p[0], p[1]), nil, 0)
		}
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "lingering":
		var peer int
		fd, peer, err = lingering()
		held = append(held, peer) // its end would be the end of the lingering
	}
	if err != nil {
		return -1, keep, fmt.Errorf("%s: %w", kind, err)
	}
	return fd, keep, nil
}

// lingering returns a TCP socket whose close waits six seconds: its peer reads
// nothing, so there is unsent data.
func lingering() (fd, peer int, err error) {
	ln, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, err
	}
	defer unix.Close(ln)
	if err := errors.Join(
		unix.SetsockoptInt(ln, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096),
		unix.Bind(ln, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		unix.Listen(ln, 1),
	); err != nil {
		return -1, -1, err
	}
	addr, err := unix.Getsockname(ln)
	if err != nil {
		return -1, -1, err
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, -1, err
	}
	if err = unix.Connect(fd, addr); err != nil {
		return fd, -1, err
	}
	if peer, _, err = unix.Accept4(ln, unix.SOCK_CLOEXEC); err != nil {
		return fd, -1, err
	}
	if err = errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 6}),
		unix.SetNonblock(fd, true),
	); err != nil {
		return fd, peer, err
	}
	data := make([]byte, 64<<10)
	for range 1000 {
		if _, err := harness.Write(fd, data); errors.Is(err, unix.EAGAIN) {
			return fd, peer, nil
		} else if err != nil {
			return fd, peer, err
		}
	}
	return fd, peer, errors.New("the socket takes any amount of data")
}

// passFDs passes files with a message, on a new connection each time.
var passFDs = harness.Inside("pass files", func(a fdArgs) ([]badResult, error) {
	var all []badResult
	buf := make([]byte, 64<<10)
	for range max(a.Times, 1) {
		c, err := dialRaw(a.Sock)
		if err != nil {
			return nil, err
		}
		var fds []int
		var keeps []func()
		for range a.Files {
			fd, keep, err := strange(a.Kind)
			if err != nil {
				return nil, err
			}
			fds, keeps = append(fds, fd), append(keeps, keep)
		}
		var r badResult
		if len(a.Login) > 0 {
			if r.Got, err = harness.Login(c, a.Login); err != nil {
				return nil, err
			}
		}
		serr := sendFiles(c, a.Data, fds...)
		for _, fd := range fds {
			unix.Close(fd) // so that the daemon's copy is the last
		}
		if serr != nil && !errors.Is(serr, unix.EPIPE) {
			return nil, serr
		}
		for (a.Read || a.ToEnd) && !r.Closed {
			n, err := harness.Read(c, buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			r.Closed = n <= 0
			r.Got = append(r.Got, buf[:max(n, 0)]...)
			if !a.ToEnd && bytes.Contains(r.Got, []byte("AGREE_UNIX_FD\r\nl")) {
				break
			}
		}
		unix.Close(c)
		for _, keep := range keeps {
			keep()
		}
		all = append(all, r)
	}
	return all, nil
})

// announcing is a call that says how many files come with it.
func announcing(t *testing.T, files uint32, iface, member string, args ...any) []byte {
	t.Helper()
	h := fields(iface, member)
	h[dbus.FieldUnixFDs] = files
	return message(t, binary.LittleEndian, 1, 0, h, args...)
}

func TestKernelBadInputFiles(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	ping := call(t, 1, harness.V0, "Ping", int32(0))
	noFDs := strings.Replace(login, "NEGOTIATE_UNIX_FD\r\n", "", 1)
	for _, tc := range []struct {
		what string
		args fdArgs
		// closed: the connection ends. Else there is an error with this text.
		closed bool
		text   string
	}{
		{"253 files, none announced", fdArgs{Data: ping, Files: 253, Kind: "null"}, true, ""},
		{"one file, none announced", fdArgs{Data: ping, Files: 1, Kind: "null"}, true, ""},
		{"253 files where none is expected", fdArgs{Data: announcing(t, 253, harness.V0, "Ping", int32(0)), Files: 253, Kind: "null"}, false, "Invalid file descriptors for Ping method"},
		{"one file where none is expected", fdArgs{Data: announcing(t, 1, harness.V0, "Create", "memory", "x"), Files: 1, Kind: "dgram"}, false, "Invalid file descriptors for Create method"},
		{"files for an unknown method", fdArgs{Data: announcing(t, 2, harness.V0, "NoSuch"), Files: 2, Kind: "null"}, false, "doesn't exist"},
		{"files with wrong arguments", fdArgs{Data: announcing(t, 2, harness.V0, "CreateScm", "x"), Files: 2, Kind: "null"}, false, "Invalid arguments to CreateScm method"},
		{"two files for one", fdArgs{Data: announcing(t, 2, harness.V0, "CreateScm", "memory", "x", h), Files: 2, Kind: "dgram"}, false, "Invalid file descriptors for CreateScm method"},
		{"an index beyond", fdArgs{Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", dbus.UnixFDIndex(7)), Files: 1, Kind: "dgram"}, false, "Bad file descriptor"},
		{"more than announced", fdArgs{Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h), Files: 2, Kind: "dgram"}, true, ""},
		{"not negotiated", fdArgs{Login: []byte(noFDs), Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h), Files: 1, Kind: "dgram"}, true, ""},
		{"with the login", fdArgs{Login: []byte{}, Data: []byte(login), Files: 1, Kind: "null"}, true, ""},
		{"with the NUL", fdArgs{Login: []byte{}, Data: []byte{0}, Files: 253, Kind: "null"}, true, ""},
	} {
		a := tc.args
		a.Sock, a.Read, a.ToEnd, a.Times = s.d.Sock, true, tc.closed, times(5)
		if a.Login == nil {
			a.Login = []byte(login)
		}
		var got []badResult
		if err := p.Run(passFDs, a, &got); err != nil {
			t.Fatalf("%s: %v", tc.what, err)
		}
		for _, r := range got {
			if r.Closed != tc.closed || !strings.Contains(string(r.Got), tc.text) {
				t.Errorf("%s: closed %v, %q", tc.what, r.Closed, r.Got)
			}
		}
	}
	// Announced, and none there: the original's text, and the next is served.
	c := dial(t, p, s.d.Sock)
	m := c.ask(announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h))
	if want := "Failed to set passcred: Bad file descriptor"; m.Type != dbus.TypeError || m.Body[0] != want {
		t.Errorf("no file: %v, want %s", m, want)
	}
	p.Close(c.fd)

	// Files of all kinds where a socket, or a pidfd, is expected.
	for _, kind := range []string{
		"null", "seqpacket", "listening", "epoll", "pipe", "eventfd", "pidfd", "directory", "path", "udp", "dgram", "stream", "lingering",
	} {
		for _, member := range []string{"CreateScm", "MoveFd"} {
			data := announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h)
			if member == "MoveFd" {
				data = announcing(t, 1, harness.V1, "MoveFd", "", h)
			}
			var got []badResult
			start := time.Now()
			if err := p.Run(passFDs, fdArgs{Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 1, Kind: kind, Read: true}, &got); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > patience() {
				t.Errorf("%s to %s: answered after %v", kind, member, took)
			}
			for _, r := range got {
				good := member == "CreateScm" && (kind == "dgram" || kind == "stream") || member == "MoveFd" && kind == "pidfd"
				if refused := bytes.Contains(r.Got, []byte("l\x03\x01")); refused == good {
					t.Errorf("%s to %s: refused %v, %q", kind, member, refused, r.Got)
				}
			}
		}
	}
	s.over(t, 6*time.Second)

	t.Run("many of them", func(t *testing.T) {
		for _, kind := range []string{"null", "full of itself"} {
			for _, read := range []bool{true, false} {
				for _, data := range [][]byte{announcing(t, 100, harness.V0, "Ping", int32(0)), ping, ping[:30]} {
					a := fdArgs{Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 100, Kind: kind, Times: times(20), Read: read && len(data) != 30}
					if err := p.Run(passFDs, a, nil); err != nil {
						t.Fatalf("%s: %v", kind, err)
					}
				}
			}
		}
		s.over(t, 5*time.Second)
	})
	if s.Exists(harness.Find(t, "memory"), "bad/x") {
		t.Error("something was created")
	}
}

// A socket that lingers when it is closed, with every message that can bring
// one, and left in the socket unread.
func TestKernelBadInputLingeringSocket(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	for what, data := range map[string][]byte{
		"not expected":  announcing(t, 1, harness.V0, "Ping", int32(0)),
		"not announced": call(t, 1, harness.V0, "Ping", int32(0)),
		"CreateScm":     announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h),
		"MoveFd":        announcing(t, 1, harness.V1, "MoveFd", "", h),
		"half":          announcing(t, 1, harness.V1, "MoveFd", "", h)[:40],
	} {
		start := time.Now()
		for _, read := range []bool{what != "half", false} {
			if err := p.Run(passFDs, fdArgs{
				Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 1, Kind: "lingering", Times: times(8), Read: read,
			}, nil); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		t.Logf("%s: %d of them took %v", what, 2*times(8), time.Since(start))
	}
	// Behind what ends the connection before they are received.
	if harness.Pipelines() {
		if err := s.d.Pause(); err != nil {
			t.Fatal(err)
		}
		err := p.Run(passFDs, fdArgs{
			Sock: s.d.Sock, Login: append([]byte{0}, make([]byte, 80<<10)...), Data: []byte("x"), Files: 1, Kind: "lingering", Times: times(16),
		}, nil)
		if err := errors.Join(err, s.d.Resume()); err != nil {
			t.Fatal(err)
		}
	}
	// Not one of them may take its six seconds.
	s.over(t, 4*time.Second)
}
