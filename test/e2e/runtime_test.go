package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// Rootless container runtimes as Debian packages them, on a host where no systemd
// delegates anything to them: what they start has no limits until cgm delegate
// gives them a place to set them.

func TestKernelDelegateRunc(t *testing.T) { delegateTo(t, "runc") }
func TestKernelDelegateCrun(t *testing.T) { delegateTo(t, "crun") }

func delegateTo(t *testing.T, program string) {
	harness.Require(t, "root", "userns", "unified", program)
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	t.Run("on the host", func(t *testing.T) {
		newUser(t, w.sub(t), program).judge(t)
	})
	t.Run("in a container", func(t *testing.T) {
		newInmate(t, w.sub(t), program).judge(t)
	})
}

// rootless is whoever runs containers without being root.
type rootless struct {
	*world
	// program is the runtime, dir where it keeps its state.
	program, dir string
	// cg is the own cgroup, below the tree; path is the same as it is shown.
	cg, path string
	// id is the own uid, in its own user namespace.
	id int
	// sh runs a script and returns its output and exit code.
	sh func(t *testing.T, script string) (string, int)
}

// environment is what the scripts have besides that of the test.
func (r *rootless) environment(sock string) []string {
	return []string{
		"CGMANAGER_ADDRESS=unix:path=" + sock, "XDG_RUNTIME_DIR=" + r.dir, "HOME=" + r.dir,
		"PATH=" + filepath.Dir(harness.Binary(r.T, "cgm")) + ":" + os.Getenv("PATH"),
	}
}

// give has the host's root make a cgroup and give it to somebody.
func (w *world) give(cg string, id int) {
	w.Helper()
	name, owner := strings.TrimPrefix(w.Path(cg), "/"), fmt.Sprint(id)
	for _, args := range [][]string{{"create", "all", name}, {"chown", "all", name, owner, owner}} {
		cmd := exec.Command(harness.Binary(w.T, "cgm"), args...)
		cmd.Env = append(os.Environ(), "CGMANAGER_ADDRESS=unix:path="+w.d.Sock)
		if out, err := cmd.CombinedOutput(); err != nil {
			w.Fatalf("cgm %v: %v\n%s", args, err, out)
		}
	}
}

func stateDir(t *testing.T) string {
	t.Helper()
	dir := harness.PublicDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// scriptTime is for a script, on an emulated machine.
func scriptTime() time.Duration { return cgtest.Patience(60 * time.Second) }

// newUser is uid 1000 of the host.
func newUser(t *testing.T, w *world, program string) *rootless {
	w.give("users/u1", 1000)
	r := &rootless{world: w, program: program, dir: stateDir(t), cg: "users/u1", path: w.Path("users/u1"), id: 1000}
	r.sh = func(t *testing.T, script string) (string, int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), scriptTime())
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-c",
			`cgm movepid all "$0" $$ && exec setpriv --reuid 1000 --regid 1000 --clear-groups sh -c "$1"`,
			strings.TrimPrefix(r.path, "/"), script)
		cmd.Env = append(os.Environ(), r.environment(w.d.Sock)...)
		cmd.WaitDelay = cgtest.Patience(5 * time.Second)
		out, err := cmd.CombinedOutput()
		if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	return r
}

// newInmate is root of a container that has user, pid, mount and cgroup
// namespaces, and the socket by a bind mount. Another process of the container
// was there before its cgroup namespace was.
func newInmate(t *testing.T, w *world, program string) *rootless {
	w.give("c1", 100000)
	outer := harness.Start(t, boxSpec(0))
	w.Place(outer, "c1")
	inner := outer.Spawn(harness.Spec{PIDNS: true, CgroupNS: true})
	r := &rootless{world: w, program: program, dir: stateDir(t), cg: "c1", path: "/"}
	r.sh = func(t *testing.T, script string) (string, int) {
		t.Helper()
		env := append([]string{"/usr/bin/env"}, r.environment("/mnt/sock")...)
		c := inner.Launch(nil, append(env, "sh", "-c", "exec 2>&1; "+script)...)
		out, err := c.Said(scriptTime())
		if err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
		ws, err := c.End(scriptTime())
		if err != nil {
			t.Fatal(err)
		}
		return out, ws.ExitStatus()
	}
	if out, code := inner.Exec(nil, "sh", "-c", `mount -t tmpfs tmpfs /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount --bind "$0" /mnt && ls /mnt`, w.d.Dir); code != 0 {
		t.Fatalf("mounts in the container: %s", out)
	}
	return r
}

// bundle makes a bundle that sleeps, in a root file system that has nothing but
// busybox, and asks for limits; cgroup is where, "" for wherever the runtime likes.
func (r *rootless) bundle(t *testing.T, cgroup string) string {
	t.Helper()
	dir := harness.PublicDir(t)
	for _, d := range []string{"bin", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "rootfs/bin/busybox"), busybox, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	ids := []object{{"containerID": 0, "hostID": r.id, "size": 1}}
	linux := object{
		"namespaces":  []object{{"type": "user"}, {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}},
		"uidMappings": ids,
		"gidMappings": ids,
		"resources": object{
			"memory": object{"limit": 32 << 20},
			"cpu":    object{"quota": 50000, "period": 100000},
			"pids":   object{"limit": 20},
		},
	}
	if cgroup != "" {
		linux["cgroupsPath"] = cgroup
	}
	config, err := json.Marshal(object{
		"ociVersion": "1.0.2",
		"process": object{
			"user": object{"uid": 0, "gid": 0}, "cwd": "/",
			"args": []string{"/bin/busybox", "sleep", "1000"},
		},
		"root": object{"path": "rootfs"},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"mode=755"}},
		},
		"linux": linux,
	})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), config, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// run is the script that starts a container in the background.
func (r *rootless) run(bundle, name, flags string) string {
	return fmt.Sprintf(`%s %s --root %s/state run -d -b %s %s </dev/null >%[3]s/log 2>&1; rc=$?; cat %[3]s/log; exit $rc`, r.program, flags, r.dir, bundle, name)
}

// do is the script of another verb of the runtime.
func (r *rootless) do(verb, name, rest string) string {
	return fmt.Sprintf("%s --root %s/state %s %s %s", r.program, r.dir, verb, name, rest)
}

// beyond allocates three times of what the container may have.
const beyond = "/bin/busybox dd if=/dev/zero of=/dev/null bs=100M count=1"

func (r *rootless) judge(t *testing.T) {
	h := harness.Find(t, "unified")
	// Before: it is refused, or, by crun on the host, run without limits.
	free := r.bundle(t, "")
	out, code := r.sh(t, r.run(free, "free", ""))
	if code != 0 && !strings.Contains(out, "cgroup") && !strings.Contains(out, "memory.max") {
		t.Errorf("without a delegation it does not run for another reason: %d, %s", code, out)
	}
	if code == 0 {
		if out, code := r.sh(t, r.do("exec", "free", beyond)); code != 0 {
			t.Errorf("without a delegation there is a limit: %d, %s", code, out)
		}
		if out, code := r.sh(t, r.do("delete -f", "free", "")); code != 0 {
			t.Errorf("delete: %d, %s", code, out)
		}
	}
	// crun may leave a threaded cgroup behind, beside which no other can be.
	r.sh(t, "rmdir /sys/fs/cgroup/free 2>&1")
	t.Logf("without a delegation: %d %s", code, out)

	// Below cgm delegate: runc needs no flag, crun the line that is printed.
	path := strings.TrimSuffix(r.path, "/") + "/rt"
	cgroup, flags := "", ""
	if r.program == "crun" {
		cgroup, flags = path+"/job", "--cgroup-manager=cgroupfs"
	}
	b := r.bundle(t, cgroup)
	out, code = r.sh(t, fmt.Sprintf("cgm delegate rt --set memory.limit=200M -- sh -c '%s'", r.run(b, "job", flags)))
	if code != 0 || !strings.Contains(out, `"cgroupsPath": "`+path+`/CONTAINER"`) {
		t.Fatalf("%s below cgm delegate: %d, %s", r.program, code, out)
	}
	job := r.cg + "/rt/job"
	for file, limit := range map[string]string{"memory.max": "33554432", "cpu.max": "50000 100000", "pids.max": "20"} {
		want(t, file+" on the host", r.Read(h, job, file), limit)
	}
	if n := len(strings.Fields(r.Read(h, job, "cgroup.procs"))); n != 1 {
		t.Errorf("%d processes are in the container's cgroup", n)
	}
	want(t, "the limit of the delegated one", r.Read(h, r.cg+"/rt", "memory.max"), "209715200")
	out, code = r.sh(t, "cgm delegate rt -- "+r.do("exec", "job", beyond))
	if code != 128+9 {
		t.Errorf("an allocation beyond the limit ends with %d: %s", code, out)
	}
	if events := r.Read(h, job, "memory.events"); !strings.Contains(events, "oom_kill 1\n") {
		t.Errorf("the kernel has killed nothing: %s", events)
	}
	if out, code := r.sh(t, r.do("delete -f", "job", "")); code != 0 {
		t.Errorf("delete: %d, %s", code, out)
	}
	eventually(t, "the delegated cgroup goes with the last process", func() bool { return !r.Exists(h, r.cg+"/rt") })
}
