package watchdog

import (
	"runtime"
	"testing"
	"time"

	"cgmanager/test/harness"
)

// each CPU, by turns.
func onEachCPU(t *testing.T, f func(t *testing.T, cpu int)) {
	for cpu := range runtime.NumCPU() {
		t.Run("cpu"+string(rune('0'+cpu)), func(t *testing.T) { f(t, cpu) })
	}
}

// A thread that sleeps a little now and then, and is never stopped by RLIMIT_RTTIME,
// is demoted within a period; one that plays beside it on the same CPU is not.
func TestKernelWatchdogHog(t *testing.T) {
	harness.Require(t, "root")
	onEachCPU(t, func(t *testing.T, cpu int) {
		k := newKennel(t, Config{})
		bad, good := newSpinner(t, hog, 8, cpu), newSpinner(t, audio, 8, cpu)
		if err := k.Ready(); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		k.watch(bad, good)
		e := k.next(slower(5 * time.Second))
		took := time.Since(began)
		if e.Kind != Demoted || e.ID != bad.ID {
			t.Fatalf("%+v", e)
		}
		if limit := slower(1200 * time.Millisecond); took > limit {
			t.Errorf("demoted after %v, later than %v", took, limit)
		}
		t.Logf("demoted after %v: it took %v of %v", took, e.Used, e.Window)
		if bad.realtime() {
			t.Error("the hog is realtime")
		}
		time.Sleep(1500 * time.Millisecond)
		if !good.realtime() {
			t.Error("the thread that plays is not realtime any more")
		}
		k.quiet()
	})
}
