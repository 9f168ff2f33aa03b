package manager_test

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A refused Kill does not stop what it may not kill, not for a moment: it
// would be a way to stop anybody's tasks.
func TestKernelRefusedKillFreezesNothing(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n := name(t)
	dir := filepath.Join(cgtest.Own(t, "freezer"), n)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, cgtest.Child(t), dir)
	rq := requestOf(t, m, os.Getpid(), 61000)
	var done, stopped atomic.Bool
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for !done.Load() {
			if frozen(dir) {
				stopped.Store(true)
			}
		}
	}()
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		if err := m.Kill(rq, n); kind(err) != api.Denied {
			t.Fatalf("Kill of another's task: %v, want a refusal", err)
		}
	}
	done.Store(true)
	<-watched
	if stopped.Load() {
		t.Error("the refused Kill froze the task")
	}
}
