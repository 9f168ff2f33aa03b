package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// anybody is the policy of a host that leaves it to the limits.
const anybody = "[[rule]]\ncontainer = \"any\"\n"

// newRealtimeContainers is a daemon that grants to anybody, and a tree for
// containers that ask it.
func newRealtimeContainers(t *testing.T, args ...string) (*realtimeWorld, *world) {
	t.Helper()
	harness.Require(t, "root", "userns")
	tree := harness.NewTree(t)
	rw := newRealtimeWorld(t, args...)
	rw.d.terminate()
	rw.policy(anybody)
	rw.d = rw.start()
	t.Cleanup(func() { rw.d.terminate() })
	w := &world{T: t, Tree: tree, via: rw.sock}
	w.fund("", 200000)
	return rw, w
}

// fund gives a cgroup realtime runtime, where the kernel budgets it: a container has
// what its host gave it, and lends that to nobody else.
func (w *world) fund(cg string, us int) {
	w.Helper()
	for _, h := range controllers() {
		file := filepath.Join(w.Dir(h, cg), "cpu.rt_runtime_us")
		if _, err := os.Stat(file); err != nil || h.V2 {
			continue
		}
		// The cgroups of another test count for a while after they were removed.
		var err error
		if !cgtest.Until(5*time.Second, 20*time.Millisecond, func() bool {
			err = os.WriteFile(file, []byte(strconv.Itoa(us)), 0)
			return !errors.Is(err, unix.EINVAL)
		}) || err != nil {
			w.Fatal(err)
		}
		// For the other tests: what is removed counts for a while.
		w.Cleanup(func() { _ = os.WriteFile(file, []byte("0"), 0) })
	}
}

// realtimeBox makes a container with realtime runtime, whose id 0 is first.
func (w *world) realtimeBox(name string, first int) *box {
	w.Helper()
	b := w.placed(harness.Start(w.T, harness.Spec{UserNS: true, PIDNS: true, MapFrom: first, MapSize: 60000}), name)
	w.fund(b.cg, 40000)
	return b
}

// hostTID is the test's number of a thread of p's.
func hostTID(t testing.TB, p *harness.Proc, tid uint64) uint64 {
	t.Helper()
	for _, n := range p.Threads() {
		if uint64(n[len(n)-1]) == tid {
			return uint64(n[0])
		}
	}
	t.Fatalf("process %d has no thread %d", p.HostPID, tid)
	return 0
}

// try asks for a thread of the process 0 for its own, and checks the answer.
func (w *realtimeWorld) try(p *harness.Proc, sock, what string, process, thread uint64, want harness.DBusError) {
	w.Helper()
	c := p.MustDial(sock)
	defer c.Close()
	if process == 0 {
		values, err := c.RT("MakeThreadRealtime", thread, uint32(5))
		w.answers(what, want, values, err)
		return
	}
	values, err := c.RT("MakeThreadRealtimeWithPID", process, thread, uint32(5))
	w.answers(what, want, values, err)
}

// ordinary checks that no thread of a process has anything.
func (w *realtimeWorld) ordinary(what string, p *harness.Proc) {
	w.Helper()
	for _, n := range p.Threads() {
		got, err := scheduled(int(n[0]))
		if err != nil && !errors.Is(err, unix.ESRCH) || err == nil && got != "other 0" {
			w.Errorf("%s: thread %d of process %d is %q (%v)", what, n[0], p.HostPID, got, err)
		}
	}
}

// The numbers are those of who asks, in whatever namespaces it is, and never the
// host's: which has processes of the same uid.
func TestKernelRealtimeNamespaces(t *testing.T) {
	rw, w := newRealtimeContainers(t, "--actions-per-burst-max=1000")
	one := w.realtimeBox("c1", 200000)
	two := one.placedIn(harness.Spec{UserNS: true, PIDNS: true, MapFrom: 10000, MapSize: 20000}, "c2")
	pidOnly := w.placed(harness.Start(t, harness.Spec{PIDNS: true}), "c3")
	userOnly := w.placed(harness.Start(t, harness.Spec{UserNS: true, MapFrom: 300000, MapSize: 60000}), "c4")
	w.fund(two.cg, 20000)
	w.fund(pidOnly.cg, 20000)
	w.fund(userOnly.cg, 20000)
	for _, c := range []struct {
		name string
		b    *box
		own  bool // it has a pid namespace of its own
	}{{"user and pid namespace", one, true}, {"two deep", two, true}, {"pid namespace alone", pidOnly, true}, {"user namespace alone", userOnly, false}} {
		for _, how := range []string{"", " through cgproxy"} {
			if how != "" && !c.own {
				continue // cgproxy needs one
			}
			t.Run(c.name+how, func(t *testing.T) {
				w, rw := w.sub(t), rw.sub(t)
				sock := rw.sock
				if how != "" {
					sock = startProxy(t, c.b.Proc, sock).sock
				}
				p := c.b.user(1000)
				rw.limit(p, 200000)
				rw.limit(c.b.Proc, 200000)
				tids := rw.threads(p, 2)
				// Of the same uid, on the host.
				host := harness.Start(t, harness.Spec{UID: p.HostUID, GID: p.HostGID})
				rw.limit(host, 200000)
				hostThread := rw.threads(host, 1)[0]

				rw.try(p, sock, "a thread of its own", 0, tids[0], rtGranted)
				rw.is(rw.p, hostTID(t, p, tids[0]), "rr 5 reset")
				rw.is(rw.p, hostTID(t, p, tids[1]), "other 0")
				rw.is(rw.p, uint64(p.HostPID), "other 0")
				rw.try(p, sock, "the first thread, 0", 0, 0, rtGranted)
				rw.is(rw.p, uint64(p.HostPID), "rr 5 reset")
				rw.try(p, sock, "with its number", uint64(p.PID), tids[1], rtGranted)
				rw.is(rw.p, hostTID(t, p, tids[1]), "rr 5 reset")

				if c.own {
					foreign := func(what string, process, thread uint64) {
						t.Helper()
						for _, q := range []*harness.Proc{p, c.b.Proc} {
							rw.try(q, sock, what, process, thread, rtNotFound)
						}
					}
					foreign("a host process of the same uid", uint64(host.HostPID), 0)
					foreign("and its thread", uint64(host.HostPID), hostThread)
					foreign("its thread alone", 0, hostThread)
					foreign("the host's number of who asks", uint64(p.HostPID), 0)
					foreign("the host's number of who asks, as a thread", 0, uint64(p.HostPID))
					foreign("the daemon", uint64(rw.d.pid), 0)
				} else {
					rw.try(p, sock, "a host process of the same uid", uint64(host.HostPID), 0, rtDenied)
					rw.try(p, sock, "and its thread", uint64(host.HostPID), hostThread, rtDenied)
					rw.try(p, sock, "its thread alone", 0, hostThread, rtNotFound)
				}
				rw.ordinary("a host process of the same uid", host)

				// Root of the container may help another uid of its, which may help
				// nobody but itself.
				q := c.b.user(1001)
				rw.limit(q, 200000)
				rw.try(p, sock, "another uid of the container", uint64(q.PID), 0, rtDenied)
				rw.try(p, sock, "root of the container", uint64(c.b.PID), 0, rtDenied)
				rw.ordinary("another uid of the container", q)
				rw.try(c.b.Proc, sock, "root, for another uid", uint64(q.PID), 0, rtGranted)
				rw.is(rw.p, uint64(q.HostPID), "rr 5 reset")

				// A host process that has entered the pid namespace is seen there, and is
				// not the container's, whatever its uid.
				if c.own && c.b != pidOnly {
					for _, uid := range []uint32{0, 1000, c.b.HostUID, p.HostUID} {
						e := harness.StartInPIDNSOf(t, c.b.Proc, harness.Spec{UID: uid, GID: uid})
						rw.limit(e, 200000)
						n := e.NSpid()
						rw.try(c.b.Proc, sock, fmt.Sprint("root, for one that entered with uid ", uid), uint64(n[len(n)-1]), 0, rtDenied)
						rw.try(p, sock, fmt.Sprint("a user, for one that entered with uid ", uid), uint64(n[len(n)-1]), 0, rtDenied)
						rw.ordinary(fmt.Sprint("who entered with uid ", uid), e)
						e.Stop()
					}
				}
				w.refusedNeighbour(rw, c.b, sock)
				q.Stop()
				p.Stop()
			})
		}
	}
	// Root around a container may help the processes in it, those in it not the
	// processes around.
	in, out := two.user(1000), one.user(1000)
	rw.limit(in, 200000)
	rw.limit(out, 200000)
	rw.try(one.Proc, rw.sock, "root around, for a process in a container of its", uint64(in.NSpid()[1]), 0, rtGranted)
	rw.is(rw.p, uint64(in.HostPID), "rr 5 reset")
	rw.try(two.Proc, rw.sock, "root in it, for a process around", uint64(out.NSpid()[1]), 0, rtNotFound)
	rw.ordinary("a process around", out)
}

// sub is w for a subtest.
func (w *realtimeWorld) sub(t *testing.T) *realtimeWorld {
	s := *w
	s.T = t
	return &s
}

// placedIn makes a container in b.
func (b *box) placedIn(s harness.Spec, name string) *box {
	b.w.Helper()
	return b.w.placed(b.Spawn(s), b.cg+"/"+name)
}

// refusedNeighbour has the root of a container ask for a process of another's.
func (w *world) refusedNeighbour(rw *realtimeWorld, b *box, sock string) {
	w.Helper()
	other := harness.Start(w.T, harness.Spec{UserNS: true, PIDNS: true, MapFrom: int(b.first), MapSize: 2000})
	defer other.Stop()
	rw.limit(other, 200000)
	want := rtNotFound
	if len(b.NSpid()) == 1 {
		want = rtDenied // it sees all of the host
	}
	rw.try(b.Proc, sock, "a neighbour's process", uint64(other.HostPID), 0, want)
	rw.ordinary("a neighbour's process", other)
}

// What a container has used up is neither its neighbour's nor the host's, and a
// container in it has nothing of its own.
func TestKernelRealtimeContainerLimits(t *testing.T) {
	ask := func(rw *realtimeWorld, p *harness.Proc, member string, args ...any) error {
		c := p.MustDial(rw.sock)
		defer c.Close()
		return second(c.RT(member, args...))
	}
	threads := func(rw *realtimeWorld, p *harness.Proc, _ int) error {
		return ask(rw, p, "MakeThreadRealtime", rw.threads(p, 1)[0], uint32(3))
	}
	processes := func(rw *realtimeWorld, p *harness.Proc, _ int) error {
		q := p.Spawn(harness.Spec{KeepIDs: true})
		rw.limit(q, 200000)
		return ask(rw, q, "MakeThreadRealtime", uint64(0), uint32(3))
	}
	again := func(rw *realtimeWorld, p *harness.Proc, n int) error {
		return ask(rw, p, "MakeThreadHighPriority", uint64(0), int32(-1-n))
	}
	const most = 4
	for _, l := range []struct {
		name, flag string
		// next has p make the next request.
		next func(rw *realtimeWorld, p *harness.Proc, n int) error
	}{
		{"threads", "--threads-per-user-max=4", threads},
		{"processes", "--processes-per-user-max=4", processes},
		{"burst", "--actions-per-burst-max=4", again},
	} {
		t.Run(l.name, func(t *testing.T) {
			rw, w := newRealtimeContainers(t, l.flag, "--actions-burst-sec=1000")
			allowed := func(what string, p *harness.Proc, n int) {
				t.Helper()
				for i := range n {
					rw.answers(fmt.Sprint(what, ", ", i+1), rtGranted, nil, l.next(rw, p, i))
				}
			}
			refused := func(what string, p *harness.Proc) {
				t.Helper()
				rw.answers(what, rtBusy, nil, l.next(rw, p, 0))
			}
			user := func(b *box, uid uint32) *harness.Proc {
				p := b.user(uid)
				rw.limit(p, 200000)
				return p
			}
			one, other := w.realtimeBox("c1", 200000), w.realtimeBox("c2", 300000)
			inner := one.placedIn(harness.Spec{UserNS: true, PIDNS: true, MapFrom: 10000, MapSize: 20000}, "in")
			w.fund(inner.cg, 20000)

			allowed("in a container", user(one, 1000), 2)
			p := user(inner, 1000)
			allowed("in a container in it", p, most-2)
			refused("one more, in the inner", p)
			refused("another uid of the inner", user(inner, 1001))
			refused("root of the inner", inner.Proc)
			refused("one more, around it", user(one, 1000))
			refused("another uid around it", user(one, 1001))
			// A new container in it has nothing either.
			more := one.placedIn(harness.Spec{UserNS: true, PIDNS: true, MapFrom: 30000, MapSize: 20000}, "more")
			w.fund(more.cg, 5000)
			refused("a new container in it", user(more, 7))

			allowed("the neighbour", user(other, 1000), most)
			refused("one more of the neighbour", user(other, 1001))

			allowed("a user of the host", rw.user(1000), most)
			refused("one more of the user's", rw.user(1000))
			allowed("another user of the host", rw.user(1001), most)
		})
	}
}

// The uid in the name of which namespaces are made pays for what is granted there,
// whatever the uids in them.
func TestKernelRealtimeMakers(t *testing.T) {
	rw, w := newRealtimeContainers(t, "--threads-per-user-max=3", "--actions-burst-sec=1000")
	maker := w.host(1000, ".")
	asks := func(p *harness.Proc) error {
		t.Helper()
		rw.limit(p, 200000)
		c := p.MustDial(rw.sock)
		defer c.Close()
		return second(c.RT("MakeThreadRealtime", uint64(0), uint32(3)))
	}
	for i := range 4 {
		p := madeBy(t, maker, 400000+1000*i)
		want := rtGranted
		if i == 3 {
			want = rtBusy
		}
		rw.answers(fmt.Sprint("from namespace ", i+1), want, nil, asks(p))
		rw.is(rw.p, uint64(p.HostPID), map[bool]string{true: "rr 3 reset", false: "other 0"}[i < 3])
	}
	rw.answers("the maker itself", rtBusy, nil, asks(maker))
	rw.answers("another user", rtGranted, nil, asks(w.host(1001, ".")))
}

// Who is refused by a rule is refused in a namespace of his own, and under another uid
// there, whoever else is let in.
func TestKernelRealtimeRefusedInANamespace(t *testing.T) {
	rw, w := newRealtimeContainers(t)
	rw.policy("[[rule]]\nuid = 1002\nallow = false\n" + anybody)
	if err := unix.Kill(rw.d.pid, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the policy is read again", func() bool { return strings.Contains(rw.log(), "was read again") })
	for uid, want := range map[uint32]harness.DBusError{1001: rtGranted, 1002: rtDenied} {
		maker := w.host(uid, ".")
		for what, p := range map[string]*harness.Proc{
			"on the host":                   maker,
			"as root of a namespace of his": rootMadeBy(t, maker, 500000),
			"under another uid in it":       madeBy(t, maker, 500000),
		} {
			rw.limit(p, 200000)
			rw.try(p, rw.sock, fmt.Sprintf("%s, %d", what, uid), 0, 0, want)
		}
	}
}

// madeBy returns a process whose uid on the host is first+1, in a user namespace that
// another process made.
func madeBy(t *testing.T, maker *harness.Proc, first int) *harness.Proc {
	t.Helper()
	q := rootMadeBy(t, maker, first).Spawn(harness.Spec{UID: 1, GID: 1})
	want(t, "its uid", q.HostUID, uint32(first+1))
	return q
}

// rootMadeBy returns root of such a namespace, who is the maker on the host.
func rootMadeBy(t *testing.T, maker *harness.Proc, first int) *harness.Proc {
	t.Helper()
	p := maker.Spawn(harness.Spec{UserNS: true})
	// What newuidmap(1) does for users with subuids.
	for _, f := range []string{"uid_map", "gid_map"} {
		m := fmt.Sprintf("0 %d 1\n1 %d 100\n", maker.HostUID, first+1)
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", p.HostPID, f), []byte(m), 0); err != nil {
			t.Fatal(err)
		}
	}
	// It has lost its capabilities when it was executed as nobody, and gets them as root.
	return p.Spawn(harness.Spec{KeepIDs: true})
}
