package manager_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// BenchmarkKernel measures requests without the transport.
func BenchmarkKernel(b *testing.B) {
	cgtest.Require(b, cgtest.Root, cgtest.V1)
	m := newManager(b)
	rq := self(b, m)
	name := "cgmtest-bench-" + strconv.Itoa(os.Getpid())
	dir := filepath.Join(cgtest.Own(b, "memory"), name)
	for _, d := range []string{"", "x", "y"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = os.Remove(filepath.Join(dir, d)) })
	}
	check := func(b *testing.B, err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Run("GetValue", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, err := m.GetValue0(rq, "memory", name+"/x", "memory.limit_in_bytes")
			check(b, err)
		}
	})
	b.Run("CreateRemove", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, err := m.Create0(rq, "memory", name+"/c")
			check(b, err)
			_, err = m.Remove0(rq, "memory", name+"/c", false)
			check(b, err)
		}
	})
	b.Run("MovePid", func(b *testing.B) {
		sleep := exec.Command("sleep", "600")
		sleep.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		check(b, sleep.Start())
		defer func() {
			_ = sleep.Process.Kill()
			_ = sleep.Wait()
		}()
		b.ReportAllocs()
		for b.Loop() {
			for _, d := range []string{"/x", "/y"} {
				check(b, m.MovePid0(rq, "memory", name+d, api.Victim{PID: int64(sleep.Process.Pid)}))
			}
		}
	})
}
