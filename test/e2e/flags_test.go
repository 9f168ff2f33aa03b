package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// --mount binds what no hierarchy has to a new one, and --skip leaves
// hierarchies alone, in the short spelling of the original too.
func TestKernelFlagsMountAndSkip(t *testing.T) {
	harness.Require(t, "root")
	tree := harness.NewTree(t)
	named := fmt.Sprintf("name=cgmtest-flags-%d", os.Getpid())
	cgtest.Discard(t, named)
	for _, args := range [][]string{
		{"--mount=" + named, "--skip=freezer,pids"},
		{"-m", named, "-M", "freezer", "-M", "pids"},
	} {
		t.Run(args[0], func(t *testing.T) {
			w := &world{T: t, Tree: tree, d: harness.StartDaemon(t, args...)}
			p := w.host(0, ".")
			c := p.MustDial(w.d.Sock)
			defer c.Close()
			a := asker{t, c}
			got, _ := a.v0("ListControllers")[0].([]string)
			for ctrl, there := range map[string]bool{named: true, "memory": true, "freezer": false, "pids": false} {
				if slices.Contains(got, ctrl) != there {
					t.Errorf("%s is among the controllers: %v, want %v: %q", ctrl, !there, there, got)
				}
			}
			for _, ctrl := range []string{"freezer", "pids"} {
				w.refused("Create in "+ctrl, func() error { return second(c.V0("Create", ctrl, "x")) })
			}
			want(t, "Create in the new hierarchy", a.v0("Create", named, "x")[0], int32(-1))
			a.v0("MovePid", named, "x", p.PID)
			want(t, "where the process is", a.v0("GetPidCgroupAbs", named, p.PID)[0], "/x")
			a.v0("MovePidAbs", named, "/", p.PID)
			// What is left in it would keep the hierarchy for ever.
			want(t, "Remove", a.v0("Remove", named, "x", int32(0))[0], int32(1))
		})
	}
}
