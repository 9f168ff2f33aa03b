package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// deepWorld returns what makes worlds inside so many containers, one in another,
// each with a proxy that asks the one around it.
func deepWorld(depth int) func(*testing.T) *world {
	return func(t *testing.T) *world {
		t.Helper()
		w := newWorld(t)
		for range depth {
			b := w.box(fmt.Sprint("in", w.depth()+1))
			w = w.within(b, startProxy(t, b.Proc, w.sock()))
		}
		return w
	}
}

// What fails against the daemon fails through proxies: users and containers of
// the innermost container against each other, its root and what is around it, as
// if the container were a host of its own. One picture shows all of the tree,
// from the outermost container on.
func TestKernelDeepAttacks(t *testing.T) {
	for depth := 3; depth > 0; depth-- {
		if testing.Short() && depth < 3 {
			break
		}
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			attacks := map[string]func(*testing.T, func(*testing.T) *world){
				"key traversal":        keyTraversal,
				"prefix of a name":     prefixOfAName,
				"ListKeys unconfined":  listKeysUnconfined,
				"Chmod of any mode":    chmodOfAnyMode,
				"Chown forgets procs":  chownForgetsProcs,
				"SetValue keys":        setValueKeys,
				"limits above":         limitsAbove,
				"setns":                impostorSetns,
				"sideways":             impostorSideways,
				"side channel":         impostorSideChannel,
				"proxy outside":        impostorProxyOutside,
				"foreign uids":         foreignUIDs,
				"passed socket":        passedSocket,
				"unmapped":             unmapped,
				"privileged container": privilegedContainer,
				"lying proxies":        lyingProxies,
			}
			for _, name := range harness.Share(slices.Sorted(maps.Keys(attacks)), 5) {
				t.Run(name, func(t *testing.T) { attacks[name](t, deepWorld(depth)) })
			}
		})
	}
}

// Through proxies the races are as without, with more places at which a request
// can be overtaken.
func TestKernelDeepRaces(t *testing.T) {
	harness.Require(t, "cc")
	t.Run("pid reuse", func(t *testing.T) { pidReuse(t, deepWorld(2), true) })
	t.Run("pid reuse of a client", func(t *testing.T) { clientPIDReuse(t, deepWorld(2)) })
	t.Run("replaced cgroup", func(t *testing.T) { replacedCgroup(t, deepWorld(2)) })
	t.Run("moved requestor", func(t *testing.T) { movedRequestor(t, deepWorld(2)) })
	t.Run("turned side channel", func(t *testing.T) { turnedSideChannel(t, deepWorld(2)) })
}

// A client ends while its request waits in the proxy, and another process of the
// same user, in a cgroup with more rights, gets its number: it has asked nothing.
func clientPIDReuse(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	victim := harness.Program(t, "testdata/victim.c", 0o755)
	b := w.box("c1")
	for _, cg := range []string{"c1/jail", "c1/mine"} {
		w.Make(cg, b.HostUID-w.first()+1000, b.HostGID-w.first()+1000)
	}
	innermost := w.proxies[len(w.proxies)-1]
	opener := b.user(1000)
	w.Place(opener, "c1/jail")
	hits := 0
	enough := func() bool { return hits >= harness.Rounds(40)/4 }
	roundsUntil(t, 40, enough, func(round int) {
		p := b.user(1000)
		w.Place(p, "c1/jail")
		// Its own connection, or one that another in the jail has opened.
		first := p
		if round%2 == 1 {
			first = opener
		}
		conn := first.MustDial(w.sock())
		if round/2%2 == 1 { // the proxies know the chain already
			asker{t, conn}.v1("ListChildren", "")
		}
		own := conn.Give(p)
		held := conn.Give(b.Proc) // the connection lives on
		defer held.Close()
		// Half of them wait unread; the others are overtaken on their way.
		send := func() error { return own.Send(harness.V1, "Create", "stolen", []string{}, map[string]string{}) }
		steps := []func() error{innermost.Pause, send}
		late := rand.IntN(2) == 0
		if late {
			steps = []func() error{send, func() error { spin(time.Duration(rand.Int64N(int64(time.Millisecond)))); return innermost.Pause() }}
		}
		for _, step := range steps {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		var pid int
		err := b.Run(reusePID, reuse{int(p.PID), 1000, victim}, &pid)
		if err == nil && pid == int(p.PID) {
			if host := hostPID(t, b, pid); host != 0 {
				hits++
				for _, h := range harness.Hierarchies() {
					w.Write(h, "c1/mine", "cgroup.procs", fmt.Sprint(host))
				}
			}
		}
		if err := errors.Join(err, innermost.Resume()); err != nil {
			t.Fatal(err)
		}
		slow := pid == 0 // it did not die at once, and may have been served
		if slow {
			p.Stop()
		} else {
			p.Reaped()
		}
		if first != p {
			conn.Close()
		}
		answer := own.AnswerTo(held)
		if why := clean(answer); why != "" || answer == nil && !late && !slow {
			t.Errorf("the answer for one that has ended: %v %s", answer, why)
		}
		for _, h := range controllers() {
			if w.Exists(h, "c1/mine/stolen") {
				t.Errorf("%s: created where the other is; the answer was %v", h.Name, answer)
			}
			// Carried out before it ended.
			if err := os.Remove(w.Dir(h, "c1/jail/stolen")); err == nil && answer != nil {
				t.Errorf("%s: created, but the answer was %v", h.Name, answer)
			}
		}
		if slow {
			return
		}
		var alive bool
		if err := b.Run(endStranger, struct{ Victim, PID int }{int(p.PID), pid}, &alive); err != nil || !alive {
			t.Errorf("the stranger: %v, %v", alive, err)
		}
	})
	t.Logf("the number was reused %d times", hits)
	if !enough() {
		t.Errorf("the number was reused %d times", hits)
	}
}

// A client that floods its proxy holds up nobody else in the container, in the one
// around, or on the host.
func TestKernelDeepFlood(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	x := startProxy(t, b.Proc, w.d.Sock)
	inner := b.box("c2")
	y := startProxy(t, inner.Proc, x.sock)
	w.Make("u", 1000, 1000)
	others := map[string]*harness.Conn{}
	for name, who := range map[string]struct {
		p    *harness.Proc
		sock string
	}{
		"a user of the container":  {inner.user(7), y.sock},
		"root of the container":    {inner.user(0), y.sock},
		"root of the one around":   {b.user(0), x.sock},
		"a user of the host":       {w.host(1000, "u"), w.d.Sock},
		"root of the host":         {w.host(0, "."), w.d.Sock},
		"root, past its own proxy": {inner.user(0), x.sock},
	} {
		c := who.p.MustDial(who.sock)
		defer c.Close()
		others[name] = c
	}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	var asked atomic.Int64
	for range 8 {
		flooder := inner.user(1000)
		wait.Go(func() {
			c, err := flooder.Dial(y.sock)
			for err == nil {
				select {
				case <-stop:
					c.Close()
					return
				default:
				}
				for range 50 {
					if err = c.Send(harness.V0, "GetTasksRecursive", "memory", ""); err != nil {
						break
					}
					asked.Add(1)
				}
				if err == nil {
					_, err = c.Reply()
				}
				if err != nil { // hung up upon: once more
					c.Close()
					c, err = flooder.Dial(y.sock)
				}
			}
		})
	}
	const flood = 400
	end, late := time.Now().Add(4*time.Second), time.Now().Add(cgtest.Patience(20*time.Second))
	for now := time.Now(); now.Before(end) || asked.Load() < flood && now.Before(late); now = time.Now() {
		for name, c := range others {
			start := time.Now()
			_, err := c.V1("ListChildren", "")
			if took := time.Since(start); err != nil || took > patience() {
				t.Errorf("%s waited %v: %v", name, took, err)
			}
		}
	}
	close(stop)
	wait.Wait()
	t.Logf("%d requests of the flood", asked.Load())
	if asked.Load() < flood {
		t.Error("there was no flood")
	}
}
