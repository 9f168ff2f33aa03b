package server

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
)

// asUser runs f on a thread whose effective and saved uid is uid: what the
// kernel puts on the sockets that f makes and connects.
func asUser(t testing.TB, uid int, f func()) {
	t.Helper()
	cgtest.Require(t, cgtest.Root)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with it
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			// This thread alone, unlike syscall.Setresuid.
			if _, _, e := syscall.RawSyscall(call, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
				t.Errorf("setresuid: %v", e)
				return
			}
		}
		f()
	}()
	<-done
}

func byUID(c api.Cred) []string {
	if c.UID == 0 {
		return nil
	}
	return []string{fmt.Sprintf("uid:%d", c.UID), "container"}
}

// loginAs is login as another user.
func (ts *testServer) loginAs(uid int) (c *client) {
	ts.t.Helper()
	asUser(ts.t, uid, func() {
		c = ts.dial()
		err := c.tryWrite([]byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"), nil)
		if !errors.Is(err, unix.EPIPE) { // refused already
			must(ts.t, err)
		}
	})
	return c
}

const loggedIn = "DATA\r\nOK %s\r\n" + agreement

func TestConnectionsPerAccount(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{Connections: 20})
	var in []*client
	for range 20 {
		c := ts.loginAs(1000)
		c.expect(fmt.Sprintf(loggedIn, ts.guid))
		in = append(in, c)
	}
	for range 30 {
		c := ts.loginAs(1000)
		c.expectClosed()
		c.close()
	}
	// Another uid of the same container counts in the container's account.
	c := ts.loginAs(1001)
	c.expectClosed()
	ts.serves()
	in[0].close()
	eventually(t, "a place is free again", func() bool { return ts.Stats().Connections == 19 })
	c = ts.loginAs(1001)
	c.expect(fmt.Sprintf(loggedIn, ts.guid))
	c.ok(ping(), "")
}

// A process for whom somebody acts counts as a connection of its own: the Backend
// holds as much of it.
func TestHandlesPerAccount(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{Connections: 20})
	in := ts.loginAs(1000)
	in.expect(fmt.Sprintf(loggedIn, ts.guid))
	for range 19 {
		in.ok(to(api.Interface1, "ActFor"), "")
	}
	in.fails(to(api.Interface1, "ActFor"), "LimitsExceeded", "too many connections")
	in.ok(ping(), "")
	c := ts.loginAs(1001)
	c.expectClosed()
	in.close()
	eventually(t, "the places are free again", func() bool { return ts.Stats().Connections == 0 })

	// Host root is bounded by the total.
	ts = serve(t, &fakeBackend{}, Limits{TotalConnections: 3})
	root := ts.login()
	root.ok(to(api.Interface1, "ActFor"), "")
	root.ok(to(api.Interface1, "ActFor"), "")
	root.fails(to(api.Interface1, "ActFor"), "LimitsExceeded", "too many connections")
	waits := ts.dial()
	waits.write([]byte(authRoot))
	time.Sleep(50 * time.Millisecond)
	if n := ts.Stats().Connections; n != 1 {
		t.Errorf("%d connections beside two handles", n)
	}
	root.close()
	waits.expect("OK " + ts.guid + "\r\n" + agreement)

	// What fails is not held.
	ts = serve(t, &fakeBackend{actFor: "fail denied"}, Limits{TotalConnections: 3})
	root = ts.login()
	for range 9 {
		root.fails(to(api.Interface1, "ActFor"), "AccessDenied", "")
	}
}

func TestHandshakesPerAccount(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{Handshakes: 4})
	for range 10 {
		asUser(t, 1000, func() { ts.dial() })
	}
	eventually(t, "only so many are left", func() bool { return ts.Stats().Connections == 4 })
	ts.serves()

	ts = serve(t, &fakeBackend{accounts: byUID}, Limits{Handshakes: 4, Handshake: 300 * time.Millisecond})
	for range 10 {
		asUser(t, 1000, func() { ts.dial() })
	}
	for range 4 {
		asUser(t, 1001, func() { ts.dial().expectClosed() })
	}
	eventually(t, "they end as well", func() bool { return ts.Stats().Connections == 0 })
}

// Beyond the total the rest wait to be accepted, and are served in their turn.
func TestTotalConnections(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{TotalConnections: 3})
	a, b, c := ts.login(), ts.login(), ts.login()
	d := ts.dial()
	d.write([]byte(authRoot))
	time.Sleep(50 * time.Millisecond)
	if n := ts.Stats().Connections; n != 3 {
		t.Errorf("%d connections", n)
	}
	b.ok(ping(), "")
	a.close()
	d.expect("OK " + ts.guid + "\r\n" + agreement)
	d.ok(ping(), "")
	c.ok(ping(), "")
}

func TestRefusedOpener(t *testing.T) {
	var allow atomic.Bool
	ts := serve(t, &fakeBackend{open: func(api.Cred) error {
		if !allow.Load() {
			return errors.New("gone")
		}
		return nil
	}}, Limits{})
	c := ts.dial()
	c.expectClosed()
	allow.Store(true)
	ts.serves()
}

func TestChanges(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{Changes: 0.001, Burst: 3})
	for i := range 5 {
		c := ts.loginAs(1000) // a new connection has no new allowance
		c.expect(fmt.Sprintf(loggedIn, ts.guid))
		if i < 3 {
			c.ok(to(api.Interface1, "Kill", "x"), "")
		} else {
			c.fails(to(api.Interface1, "Kill", "x"), "LimitsExceeded", "too many changes a second")
		}
		c.ok(to(api.Interface1, "ListTasks", "x"), "auu") // changes nothing
		c.close()
	}
	ts.serves()
}

// One account's requests occupy no more than their share of the workers.
func TestWorkersPerAccount(t *testing.T) {
	b := &fakeBackend{accounts: byUID, block: make(chan struct{})}
	ts := serve(t, b, Limits{Workers: 6, AccountWorkers: 2})
	var blocked []*client
	for range 10 {
		c := ts.loginAs(1000)
		c.expect(fmt.Sprintf(loggedIn, ts.guid))
		c.write(c.encode(to(api.Interface0, "Create", "memory", "block")))
		blocked = append(blocked, c)
	}
	for range 10 {
		ts.serves()
	}
	close(b.block)
	for _, c := range blocked {
		if m := c.message(); m.Type != wire.Return {
			t.Fatal(failure(m))
		}
		c.ok(ping(), "")
	}
}

// Requests that wait for another daemon hold up nobody's but their like.
func TestAskersApart(t *testing.T) {
	b := &fakeBackend{block: make(chan struct{})}
	ts := serve(t, b, Limits{Workers: 2})
	block := "block"
	b.realtimeEnds.Store(&block)
	var blocked []*client
	for i := range 10 {
		c := ts.login()
		m := kit("MakeThreadRealtime", uint64(0), uint32(1))
		if i%2 == 0 {
			m = to(api.Interface1, "Grant", uint32(1), "block", 1)
		}
		c.write(c.encode(m))
		blocked = append(blocked, c)
	}
	for range 10 {
		ts.serves()
	}
	close(b.block)
	for _, c := range blocked {
		if m := c.message(); m.Type != wire.Return {
			t.Fatal(failure(m))
		}
	}
}

// Input that comes while a request runs waits, and so does its end.
func TestLeavesDuringRequest(t *testing.T) {
	b := &fakeBackend{block: make(chan struct{})}
	ts := serve(t, b, Limits{})
	for range 10 {
		c := ts.login()
		c.write(c.encode(to(api.Interface0, "Create", "memory", "block")))
		c.write(c.encode(ping()))
		c.close()
	}
	ts.serves()
	idles(t)
	close(b.block)
	eventually(t, "all are gone", func() bool { return ts.Stats().Connections == 0 })
}

// idles checks that the process comes to rest.
func idles(t *testing.T) {
	t.Helper()
	used := func() time.Duration {
		var u unix.Rusage
		must(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	eventually(t, "waiting takes no CPU", func() bool {
		before := used()
		time.Sleep(200 * time.Millisecond)
		return used()-before <= 100*time.Millisecond
	})
}

// The bytes of a message that another process completes are nobody's.
func TestTwoCredentials(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	other := &unix.Ucred{Pid: 1}
	c := ts.login()
	m := c.encode(ping())
	must(t, c.tryWrite(m[:40], nil))
	must(t, c.tryWrite(m[40:], other))
	c.expectClosed()
	// Whole messages of two senders are two requests.
	c = ts.login()
	must(t, c.tryWrite(c.encode(to(api.Interface1, "ListTasks", "x")), other))
	c.message()
	if s := ts.backend.request.Load().Sender; s.PID != 1 {
		t.Errorf("sender %+v", s)
	}
	must(t, c.tryWrite(c.encode(to(api.Interface1, "ListTasks", "x")), nil))
	c.message()
	if s := ts.backend.request.Load(); s.Sender.PID != int32(os.Getpid()) || s.Opener.PID != int32(os.Getpid()) {
		t.Errorf("request %+v", s)
	}
	// Also where both are read in one go.
	both := append(c.encode(ping()), c.encode(ping())...)
	must(t, c.tryWrite(both, other))
	c.message()
	c.message()
}

// A TCP socket with unsent data, which lingers for a minute when it is closed.
func lingering(t *testing.T) (fd, peer int) {
	t.Helper()
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(l)
	must(t, unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_RCVBUF, 1024))
	must(t, unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.Listen(l, 1))
	addr, err := unix.Getsockname(l)
	must(t, err)
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Connect(fd, addr))
	peer, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	must(t, err)
	must(t, unix.SetNonblock(fd, true))
	for junk := make([]byte, 1<<16); ; {
		if _, err := unix.Write(fd, junk); err != nil {
			break
		}
	}
	must(t, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 60}))
	return fd, peer
}

func TestLingeringSocket(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID, block: make(chan struct{})}, Limits{})
	c := ts.login()
	fd, first := lingering(t)
	defer unix.Close(first)
	c.write(c.encode(scm("Create", "m", "x")), fd)
	must(t, unix.Close(fd)) // the daemon's copy is the last one
	c.message()
	ts.serves()
	start := time.Now()
	eventually(t, "closed", func() bool { return ts.Stats().ForeignFDs == 0 })
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("lingered for %v", d)
	}

	// One that waits unread when the connection ends.
	c = ts.login()
	c.write(c.encode(to(api.Interface0, "Create", "memory", "block")))
	fd, peer := lingering(t)
	defer unix.Close(peer)
	busy := func() *conn {
		for conn := range ts.conns {
			if conn.busy {
				return conn
			}
		}
		return nil
	}
	eventually(t, "the request runs: nothing more is read", func() bool {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		return busy() != nil
	})
	c.write(c.encode(ping()), fd)
	must(t, unix.Close(fd))
	ts.mu.Lock()
	busy().close()
	ts.mu.Unlock()
	close(ts.backend.block)
	ts.serves()
	start = time.Now()
	eventually(t, "gone", func() bool { return ts.Stats().Connections == 1 })
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("lingered unread for %v", d)
	}
}

// An account whose descriptors are not closed yet may pass no more; it can
// still call.
func TestForeignFDs(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{ForeignFDs: 300})
	c := ts.loginAs(1000)
	c.expect(fmt.Sprintf(loggedIn, ts.guid))
	r, _ := pipe(t)
	for range 48 { // 300-253, and one
		var s *side
		asUser(t, 1000, func() { s = newSide(t, unix.SOCK_DGRAM) })
		c.ok(scm("Create", "m", "x"), "", s.passed)
		s.drop()
	}
	c.ok(ping(), "")
	before := ts.Stats().ForeignFDs
	m := scm("Create", "m", "x")
	c.write(append(c.encode(ping()), c.encode(m)...), r)
	c.expectClosed()
	if n := ts.Stats().ForeignFDs; before < 48 || n > before {
		t.Errorf("%d descriptors, then %d", before, n)
	}
	ts.serves()
}

// What was received before the end is answered.
func TestDrain(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{Drain: time.Minute})
	idle, slow := ts.login(), ts.login()
	slow.write(append(slow.encode(to(api.Interface1, "Kill", "slow")), slow.encode(to(api.Interface1, "Kill", "slow"))...))
	late := ts.dial()
	eventually(t, "all are there", func() bool { return ts.Stats().Connections == 3 })
	late.write(append([]byte(authRoot), late.encode(ping())...))
	ts.stop()
	slow.message()
	slow.message()
	slow.expectClosed()
	late.expect("OK " + ts.guid + "\r\n" + agreement)
	late.message()
	late.expectClosed()
	idle.expectClosed()
	if _, err := os.Lstat(ts.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// What runs too long is not waited for.
func TestDrainEnds(t *testing.T) {
	b := &fakeBackend{block: make(chan struct{})}
	ts := serve(t, b, Limits{Drain: 300 * time.Millisecond})
	stuck := ts.login()
	stuck.write(stuck.encode(to(api.Interface0, "Create", "memory", "block")))
	eventually(t, "the request runs", func() bool { return b.request.Load() != nil })
	start := time.Now()
	ts.stop()
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("took %v", d)
	}
	stuck.expectClosed()
	close(b.block)
	eventually(t, "the stuck request ends", func() bool { return ts.Stats().Connections == 0 })
}

// A request that the kernel took is answered, whenever the server is told to
// end: what comes too late is refused to whoever sends it.
func TestDrainLosesNothing(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	var answered, refused atomic.Int64
	for round := range rounds {
		ts := serve(t, &fakeBackend{}, Limits{Drain: time.Minute})
		var clients sync.WaitGroup
		for i := range 16 {
			clients.Go(func() {
				b := busyClient{answered: &answered}
				for b.serve(ts.path, i%2 == 0) {
				}
				refused.Add(1)
				if b.err != nil {
					t.Error(b.err)
				}
			})
		}
		if round == 0 {
			eventually(t, "something is answered", func() bool { return answered.Load() > 0 })
		}
		time.Sleep(time.Duration(rand.IntN(int(20 * time.Millisecond))))
		ts.stop()
		clients.Wait()
		if t.Failed() {
			break
		}
	}
	t.Logf("%d requests answered, %d refused at the end", answered.Load(), refused.Load())
}

// busyClient asks until the server is gone.
type busyClient struct {
	answered *atomic.Int64
	err      error // a request that was sent and not answered
}

// serve logs in and makes calls on one connection, a single one or a thousand. It
// returns false when the server is gone.
func (b *busyClient) serve(path string, single bool) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.err = err
		return false
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return false
	}
	c := &client{fd: fd}
	calls, msg, want := 1000, []byte(authRoot), len("OK \r\n")+32+len(agreement)
	if single {
		calls = 1
	}
	for i := range calls {
		// By a worker, or by the event loop.
		m := to(api.Interface0, "GetValue", "memory", "x", "k")
		if i%4 == 3 {
			m = ping()
		}
		msg = append(msg, c.encode(m)...)
		for len(msg) > 0 {
			n, err := retry(func() (int, error) { return unix.SendmsgN(fd, msg, nil, nil, unix.MSG_NOSIGNAL) })
			if err != nil {
				return false
			}
			msg = msg[n:]
		}
		answer := make([]byte, 512)
		for got := 0; got <= want; {
			n, err := retry(func() (int, error) { return unix.Read(fd, answer[got:]) })
			if err == nil && n == 0 {
				err = io.EOF
			}
			if err != nil {
				b.err = fmt.Errorf("request %d of a connection was sent and not answered: %w", i, err)
				return false
			}
			got += n
		}
		want = 0
		b.answered.Add(1)
	}
	return true
}

// So is one that waits for credentials on a side channel.
func TestDrainFinishesExchanges(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{Drain: time.Minute})
	c, idle := ts.login(), ts.login()
	sides := []*side{newSide(t, unix.SOCK_DGRAM), newSide(t, unix.SOCK_STREAM)}
	for _, s := range sides {
		s.begin(c, scm("Create", "m", "new"))
	}
	ts.cancel()
	idle.expectClosed() // as c would be without them
	if err := c.tryWrite(c.encode(ping()), nil); !errors.Is(err, unix.EPIPE) {
		t.Errorf("sent too late: %v", err)
	}
	for _, s := range sides {
		s.expect("1")
		s.cred(os.Getpid(), 0, 0)
		s.expect("1")
	}
	c.expectClosed()
}

func TestDrainIsPrompt(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{Drain: time.Minute})
	for range 5 {
		ts.login()
	}
	start := time.Now()
	ts.stop()
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("took %v with idle connections alone", d)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sock")
	first, err := Listen(path)
	must(t, err)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Fatalf("a second one: %v", err)
	}
	// A daemon that was killed leaves its socket behind.
	must(t, first.file.Close())
	second, err := Listen(path)
	must(t, err)
	// The first one's socket is gone; the second one's stays.
	first.file, err = os.Open("/dev/null")
	must(t, err)
	if err := first.Close(); err == nil {
		t.Error("no error from shutdown of what is no socket")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error("removed a socket that is another's")
	}
	must(t, second.Close())
	if _, err := os.Lstat(path); err == nil {
		t.Error("did not remove its own")
	}
	must(t, os.WriteFile(path, nil, 0o600))
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("on a file: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}
