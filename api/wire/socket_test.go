package wire

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/api"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func socketpair(t *testing.T, kind int) (a, b int) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() {
		for _, fd := range p {
			if err := unix.Close(fd); err != nil && !errors.Is(err, unix.EBADF) {
				t.Error(err)
			}
		}
	})
	must(t, unix.SetsockoptInt(p[1], unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
	return p[0], p[1]
}

func TestRecv(t *testing.T) {
	a, b := socketpair(t, unix.SOCK_STREAM)
	me := api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	var r Receiver
	buf := make([]byte, 100)
	if _, err := r.Recv(b, buf); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("of nothing: %v", err)
	}
	must(t, unix.Sendmsg(a, []byte("one"), nil, nil, 0))
	must(t, unix.Sendmsg(a, []byte("two"), unix.UnixRights(slices.Repeat([]int{a}, MaxFDs)...), nil, 0))
	must(t, unix.Sendmsg(a, []byte("three"), nil, nil, 0))

	n, fds, err := Peek(b, buf)
	if n != 6 || !fds || err != nil {
		t.Errorf("peek: %d, %v, %v", n, fds, err)
	}
	// Up to the descriptors and no further.
	got, err := r.Recv(b, buf)
	if err != nil || string(buf[:got.N]) != "onetwo" || got.Cred != me || len(got.FDs) != MaxFDs {
		t.Fatalf("got %q, %+v, %v", buf[:got.N], got.Cred, err)
	}
	for _, fd := range got.FDs {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("descriptor %d: flags %x, %v", fd, flags, err)
		}
		must(t, unix.Close(fd))
	}
	if n, fds, err := Peek(b, buf); n != 5 || fds || err != nil {
		t.Errorf("peek: %d, %v, %v", n, fds, err)
	}
	got, err = r.Recv(b, buf)
	if err != nil || string(buf[:got.N]) != "three" || len(got.FDs) != 0 {
		t.Errorf("got %q, %v", buf[:got.N], err)
	}
	// The end of file has a credential that looks like root's.
	must(t, unix.Close(a))
	if got, err = r.Recv(b, buf); err != nil || got.N != 0 || got.Cred != (api.Cred{}) {
		t.Errorf("at the end: %+v, %v", got, err)
	}
}

// Without SO_PASSCRED there is no credential: an error, not {0, 0, 0}.
func TestRecvWithoutCredential(t *testing.T) {
	a, b := socketpair(t, unix.SOCK_STREAM)
	must(t, unix.Sendmsg(b, []byte("x"), nil, nil, 0))
	var r Receiver
	if got, err := r.Recv(a, make([]byte, 9)); !errors.Is(err, ErrControl) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestSendAs(t *testing.T) {
	for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
		a, b := socketpair(t, kind)
		cred := api.Cred{PID: 1, UID: 12, GID: 34}
		if os.Getuid() != 0 {
			cred = api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		}
		n, err := SendAs(a, []byte("p"), cred)
		if n != 1 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		var r Receiver
		if got, err := r.Recv(b, make([]byte, 9)); err != nil || got.N != 1 || got.Cred != cred {
			t.Errorf("got %+v, %v", got, err)
		}
		if _, err := SendAs(a, nil, cred); err != nil {
			t.Error(err)
		}
		got, err := r.Recv(b, make([]byte, 9))
		if kind == unix.SOCK_DGRAM && (err != nil || got.N != 0) || kind == unix.SOCK_STREAM && !errors.Is(err, unix.EAGAIN) {
			t.Errorf("nothing: got %+v, %v", got, err)
		}
		cred.PID = 1<<22 - 1
		if _, err := SendAs(a, []byte("p"), cred); !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EPERM) {
			t.Errorf("a process that is not: %v", err)
		}
	}
}

// parseControl finds the descriptors in front of whatever foreign bytes follow,
// and takes no others for them.
func FuzzControl(f *testing.F) {
	cred := unix.UnixCredentials(&unix.Ucred{Pid: 1, Uid: 2, Gid: 3})
	rights := unix.UnixRights(7, 8, 9)
	f.Add(cred)
	f.Add(append(bytes.Clone(cred), rights...))
	f.Add(append(unix.UnixRights(7), unix.UnixRights(8)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > controlSize {
			return
		}
		_, alone, fds, err := parseControl(b, nil)
		if len(fds)*4 > len(b) {
			t.Fatalf("%d descriptors in %d bytes", len(fds), len(b))
		}
		got, creds, more, err2 := parseControl(slices.Concat(cred, rights, b), nil)
		if len(more) < 3 || !slices.Equal(more[:3], []int{7, 8, 9}) || !slices.Equal(more[3:], fds) {
			t.Fatalf("got %v, want 7 8 9 and %v", more, fds)
		}
		if creds != alone+1 || creds == 1 && got != (api.Cred{PID: 1, UID: 2, GID: 3}) || (err == nil) != (err2 == nil) {
			t.Fatalf("%d credentials, %+v, %v, %v", creds, got, err, err2)
		}
	})
}
