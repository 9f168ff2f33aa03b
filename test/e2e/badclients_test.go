package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// abandonArgs are for abandon: an *Scm call whose caller leaves at a stage of it.
type abandonArgs struct {
	Sock  string
	Call  []byte
	Stage string
	Times int
}

var abandon = harness.Inside("leave an exchange", func(a abandonArgs) (int, error) {
	buf := make([]byte, 4096)
	closed := 0
	for range a.Times {
		c, err := dialRaw(a.Sock)
		if err != nil {
			return closed, err
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return closed, err
		}
		tv := timeval(5 * time.Second)
		if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return closed, err
		}
		passed := pair[1]
		if a.Stage == "a socket for itself" {
			passed = pair[0]
		}
		if _, err := harness.Login(c, []byte(login)); err != nil {
			return closed, err
		}
		if err := sendFiles(c, a.Call, passed); err != nil {
			return closed, err
		}
		unix.Close(pair[1])
		switch a.Stage {
		case "at once", "a socket for itself":
		case "after the kick", "keeping the socket":
			if n, err := harness.Read(pair[0], buf); n != 1 {
				return closed, fmt.Errorf("kick: %d, %w", n, err)
			}
		case "garbage for credentials":
			_, _ = harness.Write(pair[0], bytes.Repeat([]byte("x"), 4096))
		case "files with the credentials":
			null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return closed, err
			}
			var fds []int
			for range 200 {
				fds = append(fds, null)
			}
			_ = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fds...), nil, 0)
			unix.Close(null)
		case "without reading the result":
			if _, err := harness.Write(pair[0], []byte{0}); err != nil {
				return closed, err
			}
		}
		if a.Stage != "keeping the socket" {
			unix.Close(pair[0])
		} else {
			held = append(held, pair[0])
		}
		unix.Close(c)
	}
	return closed, nil
})

// held are files that a puppet keeps until it ends.
var held []int

// sendFiles sends data with files. Those in flight are counted against the sender
// until the daemon has received them, and those that were thrown away until the
// kernel has freed them, since Linux 6.10 later than they were closed.
func sendFiles(fd int, data []byte, files ...int) error {
	var err error
	cgtest.Until(5*time.Second, 20*time.Millisecond, func() bool {
		err = unix.Sendmsg(fd, data, unix.UnixRights(files...), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(err, unix.ETOOMANYREFS)
	})
	return err
}

func TestKernelBadInputAbandonedExchange(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	for _, stage := range []string{
		"at once", "after the kick", "keeping the socket", "garbage for credentials", "files with the credentials",
		"without reading the result", "a socket for itself",
	} {
		for member, data := range map[string][]byte{
			"CreateScm":            announcing(t, 1, harness.V0, "CreateScm", "memory", "made", h),
			"MovePidScm":           announcing(t, 1, harness.V0, "MovePidScm", "memory", "", h),
			"ListKeysScm":          announcing(t, 1, harness.V0, "ListKeysScm", "memory", "", h),
			"GetTasksRecursiveScm": announcing(t, 1, harness.V0, "GetTasksRecursiveScm", "all", "", h),
		} {
			if err := p.Run(abandon, abandonArgs{s.d.Sock, data, stage, times(25)}, nil); err != nil {
				t.Errorf("%s, %s: %v", member, stage, err)
			}
		}
		s.over(t, 9*time.Second) // it gives up after three (server.Limits.Exchange)
	}
}

// slowArgs are for slow.
type slowArgs struct {
	Sock string
	How  string
	N    int
}

// slow makes connections that take the daemon's time, and keeps them.
var slow = harness.Inside("slow clients", func(a slowArgs) ([]int, error) {
	var fds []int
	for range a.N {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return fds, err
		}
		fds = append(fds, fd)
		held = append(held, fd)
		ask := []byte("l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00")
		switch a.How {
		case "says nothing":
			continue
		case "says NUL":
			ask = []byte{0}
		case "never begins":
			ask = []byte("\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\n")
		case "half a message":
			ask = append([]byte(login), ask...)
		}
		if _, err := harness.Begin(fd, ask); err != nil {
			return fds, err
		}
	}
	return fds, nil
})

// deaf asks for much and reads nothing, until the daemon ends it. It returns
// how much it could write.
var deaf = harness.Inside("deaf clients", func(a burstArgs) (int, error) {
	wrote := 0
	var fds []int
	for range 20 {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return wrote, err
		}
		held = append(held, fd)
		fds = append(fds, fd)
		if _, err := harness.Login(fd, []byte(login)); err != nil {
			return wrote, err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return wrote, err
		}
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		for _, fd := range fds {
			n, err := harness.Write(fd, a.Streams[0])
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				return wrote, nil
			}
			wrote += max(n, 0)
		}
		time.Sleep(time.Millisecond)
	}
	return wrote, nil
})

// Clients that never read, never finish their login, or send half a message
// and no more: each is disconnected after its deadline, and holds up nobody.
func TestKernelBadInputSlowClients(t *testing.T) {
	s := newSiege(t)
	b := s.box("bad")
	p := b.Proc
	n := 0
	for _, how := range []string{"says nothing", "says NUL", "never begins", "half a message"} {
		var fds []int
		if err := p.Run(slow, slowArgs{s.d.Sock, how, 50}, &fds); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		n += len(fds)
	}
	// Before the first of them are over their time.
	eventually(t, fmt.Sprintf("the daemon has %d slow clients", n), func() bool { return s.d.FDs() >= s.fds+n })
	d := b.user(0)
	s.Place(d, "bad")
	var wrote int
	introspect := call(t, 1, "org.freedesktop.DBus.Introspectable", "Introspect")
	if err := d.Run(deaf, burstArgs{Sock: s.d.Sock, Streams: [][]byte{bytes.Repeat(introspect, 100)}}, &wrote); err != nil {
		t.Fatal(err)
	}
	t.Logf("deaf clients wrote %d bytes", wrote)
	if rss := s.status("VmRSS"); rss > 48<<10 {
		t.Errorf("the daemon has %d KiB in memory", rss)
	}
	s.over(t, 20*time.Second) // it gives up after ten (server.Limits.Handshake and Stall)
}

// crowdArgs are for crowd.
type crowdArgs struct {
	Sock  string
	N     int
	Login bool
}

type crowdResult struct {
	// Made connections, of which so many were Served: their login was answered.
	Made, Served int
	Limit        uint64
}

// crowd makes as many connections as it may, and keeps them.
var crowd = harness.Inside("a crowd", func(a crowdArgs) (r crowdResult, err error) {
	rl := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return r, err
	}
	rl.Cur = rl.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return r, err
	}
	r.Limit = rl.Cur
	var fds []int
	for range a.N {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return r, err
		}
		// Full backlogs are tried again for a while.
		for end := time.Now().Add(cgtest.Patience(time.Second)); ; time.Sleep(5 * time.Millisecond) {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: a.Sock})
			if !errors.Is(err, unix.EAGAIN) || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			unix.Close(fd)
			continue
		}
		r.Made++
		fds = append(fds, fd)
		if a.Login {
			_, _ = harness.Write(fd, []byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"))
		}
	}
	held = append(held, fds...)
	if a.Login {
		r.Served = answered(fds)
	}
	return r, nil
})

// answered waits until every login is answered or its connection closed, and counts
// the former.
func answered(fds []int) (n int) {
	buf := make([]byte, 256)
	waiting := slices.Clone(fds)
	cgtest.Until(5*time.Second, 5*time.Millisecond, func() bool {
		waiting = slices.DeleteFunc(waiting, func(fd int) bool {
			got, err := harness.Read(fd, buf)
			if got > 0 && bytes.Contains(buf[:got], []byte("OK ")) {
				n++
				return true
			}
			return got <= 0 && !errors.Is(err, unix.EAGAIN)
		})
		return len(waiting) == 0
	})
	return n
}

// 5,000 connections of one uid, from several processes.
func TestKernelBadInputCrowd(t *testing.T) {
	s := newSiege(t)
	s.Make("crowd", 3000, 3000)
	for _, login := range []bool{true, false} {
		var made, served int
		var crowds []*harness.Proc
		rounds := 5
		if testing.Short() {
			rounds = 3
		}
		for range rounds {
			p := s.host(3000, "crowd")
			crowds = append(crowds, p)
			var r crowdResult
			if err := p.Run(crowd, crowdArgs{s.d.Sock, 1000, login}, &r); err != nil {
				t.Fatal(err)
			}
			made += r.Made
			served += r.Served
		}
		t.Logf("login %v: %d connections made, %d answered; %d files", login, made, served, s.d.FDs())
		if made < rounds*900 {
			t.Errorf("only %d connections could be tried", made)
		}
		// Three files for each; without a login half as many may stay.
		bound := s.fds + 3*2048 + 16
		if !login {
			bound = s.fds + 3*1024 + 16
		}
		// Who comes after them is accepted after them.
		if err := harness.Ping(s.d.Sock); err != nil {
			t.Error(err)
		}
		eventually(t, "what is beyond the bound is closed", func() bool { return s.d.FDs() <= bound })
		if login && served < 500 {
			t.Errorf("only %d connections of one uid are served", served)
		}
		for _, p := range crowds {
			p.Stop()
		}
		s.over(t, 5*time.Second)
	}
}

// Several who take all that each may leave room for others.
func TestKernelBadInputCrowds(t *testing.T) {
	s := newSiege(t)
	var crowds []*harness.Proc
	for uid := uint32(3000); uid < 3006; uid++ {
		cg := fmt.Sprint("crowd", uid)
		s.Make(cg, uid, uid)
		p := s.host(uid, cg)
		crowds = append(crowds, p)
		var r crowdResult
		if err := p.Run(crowd, crowdArgs{s.d.Sock, 2100, true}, &r); err != nil {
			t.Fatal(err)
		}
		t.Logf("uid %d: %d connections made, %d served; %d files", uid, r.Made, r.Served, s.d.FDs())
	}
	// Somebody new, while all of them stay.
	s.Make("late", 4000, 4000)
	late := s.host(4000, "late")
	start := time.Now()
	c := late.MustDial(s.d.Sock)
	asker{t, c}.v0("Create", "memory", "late")
	c.Close()
	if took := time.Since(start); took > patience() {
		t.Errorf("who comes late is served after %v", took)
	}
	s.witnessed(12)
	for _, p := range crowds {
		p.Stop()
	}
	s.over(t, 5*time.Second)
}

// Lines without end.
func TestKernelBadInputEndlessLogin(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	nul := []byte{0}
	inputs := map[string]input{
		"no NUL":            bytesOf([]byte("AUTH EXTERNAL 30\r\n")),
		"another byte":      bytesOf(append([]byte{1}, login[1:]...)),
		"one line":          {nul, []byte("A"), 300 << 10},
		"one AUTH":          {[]byte("\x00AUTH EXTERNAL "), []byte("30"), 150 << 10},
		"many NULs":         {nul, nul, 300 << 10},
		"BEGIN first":       bytesOf([]byte("\x00BEGIN\r\n")),
		"newlines":          {nul, []byte("\n"), 300 << 10},
		"not printable":     bytesOf([]byte("\x00AUTH EXTERNAL 30\x00\r\n")),
		"a message at once": {append([]byte{0}, call(t, 1, harness.V0, "Ping", int32(0))...), nul, 1024},
	}
	for _, line := range []string{
		"AUTH", "AUTH EXTERNAL", "AUTH EXTERNAL 31", "AUTH ANONYMOUS", "AUTH DBUS_COOKIE_SHA1 30", "DATA", "DATA 30", "CANCEL", "ERROR x", "FOO", "", " ", "NEGOTIATE_UNIX_FD",
	} {
		inputs[line+" for ever"] = input{nul, []byte(line + "\r\n"), 100000}
	}
	s.closes(t, p, false, inputs)
}
