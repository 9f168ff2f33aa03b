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

// refusedByKernel is a value that the daemon hands on and the kernel refuses.
// Its key is written after all others, because a lower limit may reclaim.
var refusedByKernel = struct{ key, value string }{"memory.limit_in_bytes", "garbage"}

// A request of a container that the kernel refuses halfway leaves nothing of
// itself: neither cgroups nor values.
func TestKernelAllOrNothing(t *testing.T) {
	for level := 1; level <= 3; level += 2 {
		t.Run(fmt.Sprint("level ", level), func(t *testing.T) {
			w := newWorld(t)
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
					if !errors.As(err, &de) || !strings.Contains(de.Text, refusedByKernel.key) {
						t.Errorf("%s: the answer is %v", what, err)
					}
					return err
				})
			}
			t.Run("Create", func(t *testing.T) { createHalfway(w.sub(t), b, c, halfway) })
			t.Run("SetValue", func(t *testing.T) { setHalfway(w.sub(t), b, c, halfway) })
		})
	}
}

func createHalfway(w *world, b *box, c *harness.Conn, halfway func(string, func() error)) {
	t := w.T
	ctrls := []string{"memory", "cpu", "pids"}
	values := map[string]string{"memory.soft_limit_in_bytes": "33554432", "cpu.shares": "512", "pids.max": "10"}
	bad := maps.Clone(values)
	bad[refusedByKernel.key] = refusedByKernel.value
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
	a := asker{t, c}
	a.v1("Create", "a", []string{"cpu"}, map[string]string{})
	halfway("create below what is there in one hierarchy", func() error { return second(c.V1("Create", "a/web", ctrls, bad)) })
	// It was that value.
	a.v1("Create", "a/web", ctrls, values)
	want(t, "cpu.shares", w.Read(harness.Find(t, "cpu"), b.cg+"/a/web", "cpu.shares"), "512")
	// What is there already is another's work, too: only the values go back.
	bad["pids.max"], bad["cpu.shares"] = "11", "600"
	halfway("create what is there", func() error { return second(c.V1("Create", "a/web", ctrls, bad)) })
	a.v1("Delete", "a")
}

func setHalfway(w *world, b *box, c *harness.Conn, halfway func(string, func() error)) {
	t := w.T
	a := asker{t, c}
	before := map[string]string{
		"memory.soft_limit_in_bytes": "33554432", "memory.swappiness": "20", "cpu.shares": "512", "pids.max": "50",
	}
	keys := slices.Sorted(maps.Keys(before))
	a.v1("Create", "web", []string{"memory", "cpu", "pids"}, before)
	want(t, "before", a.v1("GetValue", "web", keys)[0], before)
	values := map[string]string{
		"memory.soft_limit_in_bytes": "1048576", "memory.swappiness": "60", "cpu.shares": "100", "pids.max": "5",
	}
	bad := maps.Clone(values)
	bad[refusedByKernel.key] = refusedByKernel.value
	halfway("set five values", func() error { return second(c.V1("SetValue", "web", bad)) })
	want(t, "after", a.v1("GetValue", "web", keys)[0], before)
	// It was that value.
	a.v1("SetValue", "web", values)
	want(t, "in the end", a.v1("GetValue", "web", keys)[0], values)
	a.v1("Delete", "web")
}
