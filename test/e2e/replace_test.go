package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// replacement is a directory for daemons that take one another's place.
type replacement struct {
	t    *testing.T
	p    *harness.Proc
	dir  string
	sock string
}

func newReplacement(t *testing.T) *replacement {
	t.Helper()
	harness.Require(t, "root")
	dir := harness.PublicDir(t)
	return &replacement{t, harness.Start(t, harness.Spec{}), dir, dir + "/sock"}
}

func (r *replacement) start(args ...string) *service {
	r.t.Helper()
	return startService(r.t, r.p, r.dir, r.sock, r.dir+"/state", args...)
}

func (r *replacement) inode(path string) uint64 {
	r.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		r.t.Fatal(err)
	}
	return st.Ino
}

func (r *replacement) log() string {
	b, err := os.ReadFile(r.dir + "/log")
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

// served waits until s answers, as the only one.
func (r *replacement) served(s *service) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("process %d answers", s.pid), s.answers)
}

// --replace takes the place of a running daemon, on the same socket.
func TestKernelReplace(t *testing.T) {
	r := newReplacement(t)
	one := r.start("--replace") // nobody to replace
	r.served(one)
	inode := r.inode(r.sock)
	for range harness.Rounds(60) {
		two := r.start("--replace")
		if code := one.wait(5 * time.Second); code != 0 {
			t.Fatalf("the daemon that was replaced ended with %d", code)
		}
		r.served(two)
		if r.inode(r.sock) != inode {
			t.Fatal("the socket is another one")
		}
		one = two
	}
	for path, mode := range map[string]uint32{r.dir + "/state": unix.S_IFDIR | 0o700, r.dir + "/state/control": unix.S_IFSOCK | 0o600} {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil || st.Mode != mode {
			t.Errorf("%s is %o, %v", path, st.Mode, err)
		}
	}
	// Without the flag it is still one for the host.
	if code := r.start().wait(5 * time.Second); code != 1 || !strings.Contains(r.log(), "--replace takes its place") {
		t.Errorf("a second daemon ended with %d", code)
	}

	// Another address: what is not named any more goes.
	first := r.sock
	r.sock = r.dir + "/other"
	two := r.start("--replace", "--listen=unix:path="+r.dir+"/third")
	if code := one.wait(5 * time.Second); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	r.served(two)
	if err := harness.Ping(r.dir + "/third"); err != nil {
		t.Errorf("the other address: %v", err)
	}
	if _, err := os.Lstat(first); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an address that is not named any more: %v", err)
	}
	// None: all stay.
	out := r.p.Launch(nil, "/bin/bash", "-c", `exec "$@" 2>>"$0"`, r.dir+"/log", harness.Binary(t, "cgmanager"), "--replace", "--state-dir="+r.dir+"/state")
	three := &service{t: t, child: out, pid: out.PID, sock: r.sock, log: two.log}
	if code := two.wait(5 * time.Second); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	r.served(three)
	if err := harness.Ping(r.dir + "/third"); err != nil {
		t.Errorf("the other address, taken over: %v", err)
	}
	three.terminate()
	left, err := os.ReadDir(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if e.Name() != "log" && e.Name() != "state" {
			t.Errorf("%s is left behind", e.Name())
		}
	}
	if _, err := os.Lstat(r.dir + "/state/control"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the control socket is left: %v", err)
	}
}

// askControl connects to the control socket and sends the words, each after the
// answer to the one before. It returns the last answer.
func askControl(path string, words ...string) (*net.UnixConn, string, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, "", err
	}
	if err := c.SetDeadline(time.Now().Add(cgtest.Patience(8 * time.Second))); err != nil {
		return c, "", err
	}
	b, fds := make([]byte, 1<<16), make([]byte, 1024)
	answer := ""
	for _, w := range words {
		if _, err := c.Write([]byte(w)); err != nil {
			return c, answer, err
		}
		n, cn, _, _, err := c.ReadMsgUnix(b, fds)
		if err != nil {
			return c, answer, err
		}
		answer = string(b[:n])
		msgs, _ := unix.ParseSocketControlMessage(fds[:cn])
		for _, m := range msgs {
			got, _ := unix.ParseUnixRights(&m)
			for _, fd := range got {
				unix.Close(fd)
			}
		}
	}
	return c, answer, nil
}

// Whoever asks for the daemon's place and ends at any step leaves it serving.
func TestKernelReplaceGivenUp(t *testing.T) {
	r := newReplacement(t)
	d := r.start()
	r.served(d)
	inode, files := r.inode(r.sock), 0
	openFiles := func() int {
		n, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(n)
	}
	for round := range 3 {
		for n, words := range [][]string{{}, {"replace 1"}, {"replace 1", "go"}, {"replace 2"}, {"go"}} {
			c, answer, err := askControl(r.dir+"/state/control", words...)
			if n < 3 && err != nil {
				t.Errorf("after %q: %q, %v", words, answer, err)
			}
			if c != nil {
				_ = c.Close()
			}
			r.served(d)
			if r.inode(r.sock) != inode {
				t.Fatal("the socket is another one")
			}
		}
		if round == 0 {
			// Until the daemon has closed what was asked, the number goes down.
			same := 0
			for end := time.Now().Add(cgtest.Patience(5 * time.Second)); same < 10 && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
				if n := openFiles(); n == files {
					same++
				} else {
					files, same = n, 0
				}
			}
			continue
		}
		eventually(t, fmt.Sprintf("no more than %d files are open", files), func() bool { return openFiles() <= files })
	}
	two := r.start("--replace")
	if code := d.wait(5 * time.Second); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	r.served(two)
	two.terminate()
}

// askStranger connects to the control socket and returns what a successor is told.
var askStranger = harness.Inside("ask stranger", func(path string) (string, error) {
	c, answer, err := askControl(path, "replace 1")
	if c != nil {
		_ = c.Close()
	}
	return fmt.Sprint(answer, err), nil
})

// The daemon's place is for root alone, whatever the modes are.
func TestKernelReplaceByStranger(t *testing.T) {
	harness.Require(t, "userns")
	r := newReplacement(t)
	d := r.start()
	r.served(d)
	for _, path := range []string{r.dir + "/state", r.dir + "/state/control"} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for who, p := range map[string]*harness.Proc{
		"a user":              harness.Start(t, harness.Spec{UID: 1000, GID: 1000}),
		"root of a container": harness.Start(t, boxSpec(0)),
	} {
		var got string
		if err := p.Run(askStranger, r.dir+"/state/control", &got); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(got, "sock") || !strings.Contains(got, "EOF") && !strings.Contains(got, "reset") && !strings.Contains(got, "broken pipe") {
			t.Errorf("%s was told %q", who, got)
		}
	}
	eventually(t, "it is in the log", func() bool { return strings.Contains(r.log(), "may not ask") })
	d.serve().terminate()
}

// Who is not root has no place to give away, and is not asked.
func TestKernelReplaceImpostor(t *testing.T) {
	r := newReplacement(t)
	u := harness.Start(t, harness.Spec{UID: 4000, GID: 4000})
	if err := errors.Join(os.Mkdir(r.dir+"/state", 0o755), os.Chown(r.dir+"/state", 4000, 4000)); err != nil {
		t.Fatal(err)
	}
	l := u.Socket(unix.SOCK_SEQPACKET)
	u.Bind(l, r.dir+"/state/control")
	u.Listen(l)
	start := time.Now()
	if code := r.start("--replace").wait(8 * time.Second); code != 1 {
		t.Errorf("it ended with %d", code)
	}
	// It would wait for the answer of one who has a place for five seconds.
	if took := time.Since(start); took > cgtest.Patience(4*time.Second) {
		t.Errorf("after %v", took)
	}
	if log := r.log(); !strings.Contains(log, "it is user 4000's (hint: ") {
		t.Error(log)
	}
	if d, err := u.Recv(u.Accept(l), time.Second); err != nil || len(d.Data) > 0 {
		t.Errorf("it was asked: %q, %v", d.Data, err)
	}
}

// A daemon that hangs is not replaced, and whoever wanted that says so.
func TestKernelReplaceHung(t *testing.T) {
	r := newReplacement(t)
	d := r.start()
	r.served(d)
	d.signal(unix.SIGSTOP)
	start := time.Now()
	two := r.start("--replace")
	if code := two.wait(10 * time.Second); code != 1 || !strings.Contains(r.log(), "it hangs, or is stopped") {
		t.Errorf("ended with %d", code)
	}
	t.Logf("given up after %v", time.Since(start))
	d.signal(unix.SIGCONT)
	r.served(d)
	d.terminate()
}

// kill -9 of either at any moment: somebody serves, or the next one starts.
func TestKernelReplaceKilled(t *testing.T) {
	r := newReplacement(t)
	old := r.start()
	r.served(old)
	var oldServes, newServes, none int
	for round := range harness.Rounds(100) {
		next := holdService(t, r.p, r.dir, r.sock, r.dir+"/state", "--replace").release()
		span := 15 * time.Millisecond
		if harness.Emulated() {
			span *= 20
		}
		time.Sleep(rand.N(span))
		victim, other := old, next
		if round%2 == 1 {
			victim, other = next, old
		}
		_ = victim.child.Kill() // it may have ended by itself
		code := victim.wait(time.Second)
		switch {
		case victim == old && code != 0 && code != -1:
			t.Errorf("the old one ended with %d", code)
		case victim == next && code != -1:
			t.Errorf("the new one ended with %d", code)
		}
		// Either the other one serves by now, or soon, or it has ended because
		// it had been replaced; then there is nobody.
		serves := false
		for end := time.Now().Add(cgtest.Patience(10 * time.Second)); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if serves = other.answers(); serves {
				break
			}
			if gone, err := other.ended(); gone || err != nil {
				break
			}
		}
		switch {
		case serves && other == next:
			newServes++
		case serves:
			oldServes++
		default:
			if code := other.wait(time.Second); other != old || code != 0 {
				t.Fatalf("round %d: nobody serves, and the other one ended with %d", round, code)
			}
			none++
			other = r.start()
			r.served(other)
		}
		old = other
	}
	t.Logf("the old one serves on %d times, the new one %d, and %d times there was nobody any more", oldServes, newServes, none)
	old.serve().terminate()
}

// After kill -9 the next start serves at once.
func TestKernelKilledServesAgain(t *testing.T) {
	r := newReplacement(t)
	tree := harness.NewTree(t)
	for i := range 50 { // it looks for marks in all of them
		tree.Make(fmt.Sprint("c", i), 0, 0)
	}
	d := r.start()
	r.served(d)
	bound := cgtest.Patience(200 * time.Millisecond)
	if harness.Emulated() { // where starting any program takes a second or more
		bound = cgtest.Patience(4 * time.Second)
	}
	var all []time.Duration
	for range harness.Rounds(200) {
		d.kill9()
		next := holdService(t, r.p, r.dir, r.sock, r.dir+"/state")
		start := time.Now()
		next.release()
		for harness.Ping(r.sock) != nil && time.Since(start) < 2*bound {
			time.Sleep(time.Millisecond)
		}
		took := time.Since(start)
		if took > bound {
			t.Errorf("it took %v", took)
		}
		all = append(all, took)
		d = next
	}
	t.Logf("serves again after %v", all)
	d.terminate()
}
