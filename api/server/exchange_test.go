package server

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// side is the caller's end of a side channel.
type side struct {
	t    testing.TB
	mine int
	// passed is the daemon's end, which the caller usually closes.
	passed int
}

func newSide(t testing.TB, kind int) *side {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	s := &side{t, p[0], p[1]}
	t.Cleanup(func() { s.close(); s.drop() })
	must(t, unix.SetsockoptInt(s.mine, unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
	must(t, unix.SetsockoptTimeval(s.mine, unix.SOL_SOCKET, unix.SO_RCVTIMEO, inTime()))
	return s
}

func (s *side) close() {
	if s.mine >= 0 {
		must(s.t, unix.Close(s.mine))
		s.mine = -1
	}
}

func (s *side) drop() {
	if s.passed >= 0 {
		must(s.t, unix.Close(s.passed))
		s.passed = -1
	}
}

// receive returns the next message and the pid of its credential.
func (s *side) receive() (string, int32) {
	s.t.Helper()
	var b [70000]byte
	control := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	var oobn int
	n, err := retry(func() (n int, err error) {
		n, oobn, _, _, err = unix.Recvmsg(s.mine, b[:], control, 0)
		return n, err
	})
	must(s.t, err)
	var pid int32
	if msgs, err := unix.ParseSocketControlMessage(control[:oobn]); err == nil && len(msgs) == 1 {
		cred, err := unix.ParseUnixCredentials(&msgs[0])
		must(s.t, err)
		pid = cred.Pid
	}
	return string(b[:n]), pid
}

func (s *side) expect(want ...string) {
	s.t.Helper()
	for _, w := range want {
		if got, _ := s.receive(); got != w {
			s.t.Fatalf("got %q, want %q", got, w)
		}
	}
}

func (s *side) cred(pid, uid, gid int) {
	s.t.Helper()
	must(s.t, unix.Sendmsg(s.mine, []byte{'p'}, unix.UnixCredentials(&unix.Ucred{Pid: int32(pid), Uid: uint32(uid), Gid: uint32(gid)}), nil, 0))
}

func scm(member string, args ...any) call {
	m := to(api.Interface0, member+"Scm", append(args, handle(0))...)
	m.fds = 1
	return m
}

// begin makes the call, which must be answered at once with nothing.
func (s *side) begin(c *client, m call) {
	s.t.Helper()
	must(s.t, c.ok(m, "", s.passed).Close())
	s.drop()
}

func count(n int32) string {
	return string(binary.NativeEndian.AppendUint32(nil, uint32(n)))
}

// The bytes and their boundaries are those that the original was seen to send.
func TestScm(t *testing.T) {
	me := os.Getpid()
	b := &fakeBackend{pids: []int32{int32(me), 1}}
	ts := serve(t, b, Limits{})
	c := ts.login()
	c.ok(ping(), "")
	for _, row := range []struct {
		call  call
		creds int
		want  []string
	}{
		{scm("Create", "m", "new"), 1, []string{"1"}},
		{scm("Create", "m", "there"), 1, []string{"2"}},
		{scm("Create", "m", "fail denied"), 1, []string{"0"}},
		{scm("Create", "m", "panic"), 1, []string{"0"}},
		{scm("Remove", "m", "there", 1), 1, []string{"2"}},
		{scm("Remove", "m", "x", 1), 1, []string{"1"}},
		{scm("Remove", "m", "fail busy", 1), 1, []string{"0"}},
		{scm("MovePid", "m", "x"), 2, []string{"1"}},
		{scm("MovePid", "m", "fail denied"), 2, []string{"0"}},
		{scm("MovePidAbs", "m", "x"), 2, []string{"1"}},
		{scm("GetPidCgroup", "m"), 2, []string{fmt.Sprintf("pid cred %d\x00", me)}},
		{scm("GetPidCgroup", "fail not found"), 2, []string{""}},
		{scm("GetPidCgroupAbs", "m"), 2, []string{fmt.Sprintf("/pid cred %d\x00", me)}},
		{scm("GetValue", "m", "x", "k"), 1, []string{"m x k\x00"}},
		{scm("GetValue", "m", "fail not found", "k"), 1, []string{""}},
		{scm("GetValue", "m", "x", "long"), 1, []string{""}},
		{scm("SetValue", "m", "x", "k", "v"), 1, []string{"1"}},
		{scm("SetValue", "m", "fail denied", "k", "v"), 1, []string{"0"}},
		{scm("Chown", "m", "x"), 2, []string{"1"}},
		{scm("Chown", "m", "fail denied"), 2, []string{"0"}},
		{scm("Chmod", "m", "x", "tasks", 436), 1, []string{"1"}},
		{scm("Chmod", "m", "fail denied", "tasks", 436), 1, []string{"0"}},
		{scm("GetTasks", "m", "x"), 1, []string{count(2), "p", "p"}},
		{scm("GetTasks", "m", "fail not found"), 1, []string{count(-1)}},
		{scm("GetTasksRecursive", "m", "x"), 1, []string{count(2), "p", "p"}},
		{scm("ListChildren", "m", "x"), 1, []string{count(2), count(6), "k1\x00k2\x00"}},
		{scm("ListChildren", "m", "empty"), 1, []string{count(0)}},
		{scm("ListChildren", "m", "fail not found"), 1, []string{count(-1)}},
		{scm("ListKeys", "m", "x"), 1, []string{
			count(2), count(1024),
			"tasks\n0\n0\n33188\nx\n1000\n4294967295\n33060\n" + strings.Repeat("\x00", 1024-40),
		}},
		{scm("ListKeys", "m", "fail not found"), 1, []string{count(-1)}},
		{scm("RemoveOnEmpty", "m", "x"), 1, []string{"1"}},
		{scm("RemoveOnEmpty", "m", "fail denied"), 1, []string{"0"}},
		{scm("Prune", "m", "x"), 1, []string{"1"}},
		{scm("Prune", "m", "fail not found"), 1, []string{"0"}},
	} {
		for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
			name := fmt.Sprintf("%s %v %d", row.call.member, row.call.args, kind)
			s := newSide(t, kind)
			s.begin(c, row.call)
			for i := range row.creds {
				s.expect("1")
				s.cred(me, i*1000, 0)
			}
			if kind == unix.SOCK_STREAM {
				// A stream has no boundaries.
				want := strings.Join(row.want, "")
				var got string
				for len(got) < len(want) {
					part, _ := s.receive()
					got += part
				}
				if got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
				if end, _ := s.receive(); end != "" {
					t.Errorf("%s: %q after the end", name, end)
				}
			} else {
				s.expect(row.want...)
			}
			s.close()
		}
	}
	eventually(t, "no exchange left", func() bool { return ts.Stats().Exchanges == 0 })
}

// The first credential is whom the proxy acts for, the second is the victim or
// the new owner.
func TestScmCredentials(t *testing.T) {
	b := &fakeBackend{pids: []int32{1, int32(os.Getpid())}}
	ts := serve(t, b, Limits{})
	c := ts.login()
	s := newSide(t, unix.SOCK_DGRAM)
	s.begin(c, scm("MovePid", "m", "x"))
	s.expect("1")
	s.cred(1, 12, 34)
	s.expect("1")
	s.cred(os.Getpid(), 0, 0)
	s.expect("1")
	rq := b.request.Load()
	if rq.For == nil || *rq.For != (api.Cred{PID: 1, UID: 12, GID: 34}) || rq.Sender.PID != int32(os.Getpid()) {
		t.Errorf("got %+v, for %+v", rq, rq.For)
	}

	s = newSide(t, unix.SOCK_DGRAM)
	s.begin(c, scm("GetTasks", "m", "x"))
	s.expect("1")
	s.cred(1, 0, 0)
	s.expect(count(2))
	for _, want := range b.pids {
		if data, pid := s.receive(); data != "p" || pid != want {
			t.Errorf("got %q from %d, want p from %d", data, pid, want)
		}
	}
}

// More tasks than a socket takes at once, some of them gone by now.
func TestScmManyTasks(t *testing.T) {
	b := &fakeBackend{}
	for range 500 {
		b.pids = append(b.pids, 1, 1<<22-1)
	}
	ts := serve(t, b, Limits{})
	c := ts.login()
	s := newSide(t, unix.SOCK_DGRAM)
	s.begin(c, scm("GetTasks", "m", "x"))
	s.expect("1")
	s.cred(1, 0, 0)
	s.expect(count(1000))
	for i := range 1000 {
		data, pid := s.receive()
		if want := []int32{1, int32(os.Getpid())}[i%2]; data != "p" || pid != want {
			t.Fatalf("task %d: got %q from %d, want %d", i, data, pid, want)
		}
		if i == 10 {
			ts.serves()
		}
	}
}

// The daemon writes to nothing but an unnamed socket pair of the caller's own.
func TestScmForeignSockets(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.login()
	dir := t.TempDir()
	socket := func(domain, kind int) int {
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	service := socket(unix.AF_UNIX, unix.SOCK_DGRAM)
	must(t, unix.Bind(service, &unix.SockaddrUnix{Name: dir + "/service"}))
	toService := socket(unix.AF_UNIX, unix.SOCK_DGRAM)
	must(t, unix.Connect(toService, &unix.SockaddrUnix{Name: dir + "/service"}))
	abstract := socket(unix.AF_UNIX, unix.SOCK_DGRAM)
	must(t, unix.Bind(abstract, &unix.SockaddrUnix{Name: "@\x00\x00"}))
	toAbstract := socket(unix.AF_UNIX, unix.SOCK_DGRAM)
	must(t, unix.Connect(toAbstract, &unix.SockaddrUnix{Name: "@\x00\x00"}))
	own := newSide(t, unix.SOCK_DGRAM)
	must(t, unix.Bind(own.passed, &unix.SockaddrUnix{Name: dir + "/own"}))
	r, _ := pipe(t)
	seqpacket := newSide(t, unix.SOCK_SEQPACKET)
	for name, fd := range map[string]int{
		"a service's":     service,
		"to a service":    toService,
		"to an abstract":  toAbstract,
		"a named end":     own.passed,
		"to a named end":  own.mine,
		"unconnected":     socket(unix.AF_UNIX, unix.SOCK_DGRAM),
		"TCP":             socket(unix.AF_INET, unix.SOCK_STREAM),
		"UDP":             socket(unix.AF_INET, unix.SOCK_DGRAM),
		"netlink":         socket(unix.AF_NETLINK, unix.SOCK_RAW),
		"a pipe":          r,
		"seqpacket":       seqpacket.passed,
		"the connection":  c.fd,
		"its own program": int(openSelf(t).Fd()),
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			c.fails(scm("Create", "m", "x"), "InvalidArgs", "invalid request: CreateScm: the file descriptor is not an end of an unnamed socket pair", fd)
		})
	}
	c.t = t
	must(t, unix.SetNonblock(service, true))
	if n, err := unix.Read(service, make([]byte, 8)); err == nil {
		t.Errorf("the service got %d bytes of the daemon", n)
	}
}

// A pair that somebody else made is not the opener's.
func TestScmOthersPair(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	var made *side
	asUser(t, 1000, func() { made = newSide(t, unix.SOCK_DGRAM) })
	c := ts.login()
	c.fails(scm("Create", "m", "x"), "InvalidArgs", "not an end of an unnamed socket pair of the caller's own", made.passed)
}

func openSelf(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open("/proc/self/exe")
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// abandoned lets callers leave an exchange, after which nothing of it may be left.
func (ts *testServer) abandoned(callers map[string]func(s *side)) {
	t, ok := ts.t.(*testing.T)
	if !ok {
		panic("not a test")
	}
	c := ts.login()
	for name, leave := range callers {
		t.Run(name, func(t *testing.T) {
			c.t = t
			s := newSide(t, unix.SOCK_DGRAM)
			s.begin(c, scm("MovePid", "m", "x"))
			leave(s)
			eventually(t, "nothing left", ts.noExchange)
		})
	}
	c.t = t
}

func (ts *testServer) noExchange() bool {
	st := ts.Stats()
	return st.Exchanges == 0 && st.ForeignFDs == 0
}

// A caller that leaves, or says nothing, costs nothing that lasts.
func TestScmExpires(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{Exchange: 300 * time.Millisecond})
	ts.abandoned(map[string]func(s *side){
		"leaves":       func(s *side) { s.close() }, // the kernel does not tell
		"says nothing": func(*side) {},
		"says nothing more": func(s *side) {
			s.expect("1")
			_ = unix.Sendmsg(s.mine, []byte{'p'}, unix.UnixCredentials(&unix.Ucred{Pid: 1}), nil, 0) // or too late
		},
	})
}

// One that says the wrong thing, or whose connection ends, costs nothing from then on.
func TestScmAbandoned(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{Exchanges: 8})
	r, _ := pipe(t)
	ts.abandoned(map[string]func(s *side){
		"empty message": func(s *side) { must(t, unix.Send(s.mine, nil, 0)) },
		"passes a file": func(s *side) { must(t, unix.Sendmsg(s.mine, []byte{'p'}, unix.UnixRights(r), nil, 0)) },
	})
	// The connection goes: its exchanges go at once.
	gone := ts.login()
	s := newSide(t, unix.SOCK_DGRAM)
	s.begin(gone, scm("Create", "m", "x"))
	gone.close()
	eventually(t, "nothing left", ts.noExchange)

	// No more than so many at a time.
	c := ts.login()
	for i := range 9 {
		s := newSide(t, unix.SOCK_DGRAM)
		if i < 8 {
			s.begin(c, scm("Create", "m", "x"))
		} else {
			c.fails(scm("Create", "m", "x"), "InvalidArgs", "too many calls wait", s.passed)
		}
	}
	ts.serves()
	c.close()
	eventually(t, "nothing left", ts.noExchange)
}

// A caller that keeps a copy of the daemon's end cannot keep the daemon busy
// with it when the exchange has ended.
func TestScmCopyKept(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.login()
	s := newSide(t, unix.SOCK_DGRAM)
	c.ok(scm("Create", "m", "x"), "", s.passed)
	s.expect("1")
	c.close()
	eventually(t, "closed", func() bool { return ts.Stats().ForeignFDs == 0 })
	must(t, unix.Send(s.mine, []byte("still there?"), 0))
	idles(t)
}

// A descriptor works in the first message, even in one write with BEGIN.
func TestFDWithBegin(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	for range 20 {
		c := ts.dial()
		s := newSide(t, unix.SOCK_DGRAM)
		c.write(append([]byte(authRoot), c.encode(scm("Create", "m", "there"))...), s.passed)
		c.expect("OK " + ts.guid + "\r\n" + agreement)
		if m := c.message(); m.Type != 2 {
			t.Fatal(failure(m))
		}
		s.expect("1")
		s.cred(os.Getpid(), 0, 0)
		s.expect("2")
		c.close()
	}
}

func TestMoveFd(t *testing.T) {
	b := &fakeBackend{}
	ts := serve(t, b, Limits{})
	c := ts.login()
	m := to(api.Interface1, "MoveFd", "x", handle(0))
	m.fds = 1
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	must(t, err)
	defer unix.Close(pidfd)
	c.ok(m, "", pidfd)
	r, _ := pipe(t)
	c.fails(m, "InvalidArgs", "not a pidfd", r)
	m.fds = 0
	c.fails(m, "InvalidArgs", "Bad file descriptor")
}
