package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// keys are files of this host's version: what is written to another's is
// translated, and so refused before anything is done.
type keys struct {
	limit, soft, share string
	// more is one more of the memory controller, that takes any of its values.
	more                string
	moreValue, moreElse string
}

func hostKeys(t *testing.T) keys {
	t.Helper()
	if harness.Find(t, "memory").V2 {
		return keys{"memory.max", "memory.low", "cpu.weight", "memory.high", "536870912", "268435456"}
	}
	return keys{"memory.limit_in_bytes", "memory.soft_limit_in_bytes", "cpu.shares", "memory.swappiness", "20", "60"}
}

// refusedByKernel adds a value that the daemon hands on and the kernel refuses.
// Its key is written after all others, because a lower limit may reclaim.
func (k keys) refusedByKernel(values map[string]string) map[string]string {
	bad := maps.Clone(values)
	bad[k.limit] = "garbage"
	return bad
}

// A request of a container that the kernel refuses halfway leaves nothing of
// itself: neither cgroups nor values.
func TestKernelAllOrNothing(t *testing.T) {
	for level := 1; level <= 3; level += 2 {
		t.Run(fmt.Sprint("level ", level), func(t *testing.T) {
			w, k := newWorld(t), hostKeys(t)
			b := w.boxAt(level)
			c := b.MustDial(w.d.Sock)
			t.Cleanup(c.Close)
			// halfway is a refusal that names what the kernel did not take, which
			// shows that all before it was done.
			halfway := func(what string, attack func() error) {
				t.Helper()
				w.refused(what, func() error {
					err := attack()
					var de *harness.DBusError
					if !errors.As(err, &de) || !strings.Contains(de.Text, k.limit) {
						t.Errorf("%s: the answer is %v", what, err)
					}
					return err
				})
			}
			t.Run("Create", func(t *testing.T) { createHalfway(w.sub(t), b, c, k, halfway) })
			t.Run("SetValue", func(t *testing.T) { setHalfway(w.sub(t), b, c, k, halfway) })
		})
	}
}

func createHalfway(w *world, b *box, c *harness.Conn, k keys, halfway func(string, func() error)) {
	t := w.T
	ctrls := []string{"memory", "cpu", "pids"}
	values := map[string]string{k.soft: "33554432", k.share: "512", "pids.max": "10"}
	bad := k.refusedByKernel(values)
	a := asker{t, c}
	// What a v2 cgroup gives to its children stays given: somebody else's limits
	// may hang on it by then. So that is done before.
	given := func(cg string) {
		t.Helper()
		a.v1("Create", cg, ctrls, map[string]string{})
		a.v1("Delete", cg)
	}
	given("first")
	for _, name := range []string{"web", "a/b/web"} {
		halfway("create "+name, func() error { return second(c.V1("Create", name, ctrls, bad)) })
		for _, h := range harness.Hierarchies() {
			for _, cg := range []string{"web", "a"} {
				if w.Exists(h, b.cg+"/"+cg) {
					t.Errorf("%s: %s is left", h.Name, cg)
				}
			}
		}
	}
	// Its parents stay where they are another's work.
	a.v1("Create", "a", []string{"cpu"}, map[string]string{})
	if harness.Find(t, "memory").V2 { // elsewhere it would be there in all of them
		given("a/first")
	}
	halfway("create below what is there in one hierarchy", func() error { return second(c.V1("Create", "a/web", ctrls, bad)) })
	// It was that value.
	a.v1("Create", "a/web", ctrls, values)
	want(t, k.share, w.Read(harness.Find(t, "cpu"), b.cg+"/a/web", k.share), "512")
	// What is there already is another's work, too: only the values go back.
	bad["pids.max"], bad[k.share] = "11", "600"
	halfway("create what is there", func() error { return second(c.V1("Create", "a/web", ctrls, bad)) })
	a.v1("Delete", "a")
}

func setHalfway(w *world, b *box, c *harness.Conn, k keys, halfway func(string, func() error)) {
	t := w.T
	a := asker{t, c}
	before := map[string]string{
		k.soft: "33554432", k.more: k.moreValue, k.share: "512", "pids.max": "50",
	}
	names := slices.Sorted(maps.Keys(before))
	a.v1("Create", "web", []string{"memory", "cpu", "pids"}, before)
	want(t, "before", a.v1("GetValue", "web", names)[0], before)
	values := map[string]string{
		k.soft: "1048576", k.more: k.moreElse, k.share: "100", "pids.max": "5",
	}
	bad := k.refusedByKernel(values)
	halfway("set five values", func() error { return second(c.V1("SetValue", "web", bad)) })
	want(t, "after", a.v1("GetValue", "web", names)[0], before)
	// It was that value.
	a.v1("SetValue", "web", values)
	want(t, "in the end", a.v1("GetValue", "web", names)[0], values)
	a.v1("Delete", "web")
}
