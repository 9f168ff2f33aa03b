package e2e_test

import (
	"fmt"
	"testing"

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
			for name, attack := range map[string]func(*testing.T, func(*testing.T) *world){
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
			} {
				t.Run(name, func(t *testing.T) { attack(t, deepWorld(depth)) })
			}
		})
	}
}

// Through proxies the races are as without, with more places at which a request
// can be overtaken.
func TestKernelDeepRaces(t *testing.T) {
	harness.Require(t, "cc")
	t.Run("pid reuse", func(t *testing.T) { pidReuse(t, deepWorld(2), true) })
	t.Run("replaced cgroup", func(t *testing.T) { replacedCgroup(t, deepWorld(2)) })
	t.Run("moved requestor", func(t *testing.T) { movedRequestor(t, deepWorld(2)) })
	t.Run("turned side channel", func(t *testing.T) { turnedSideChannel(t, deepWorld(2)) })
}
