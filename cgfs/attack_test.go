package cgfs

import (
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// A handle stays with the cgroup that was looked at, whatever takes its name.
func TestKernelRecreated(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		c := mkdir(t, p.dir, "c")
		before, err := c.Attr()
		check(t, err)
		held, err := c.File("cgroup.procs", ForWrite)
		check(t, err)
		defer held.Close()
		facts, err := c.File("cgroup.procs", ForFacts)
		check(t, err)
		defer facts.Close()
		check(t, os.Remove(filepath.Join(p.path, "c")))
		check(t, os.Mkdir(filepath.Join(p.path, "c"), 0o755))

		if err := held.Write("0"); err == nil {
			t.Error("a task went into the new cgroup, or the old one")
		}
		_, err = c.File("cgroup.procs", ForRead)
		wantErr(t, "open a file", err, fs.ErrNotExist)
		_, err = c.Mkdir("x", 0, 0)
		if err == nil {
			t.Error("a child was made")
		}
		_, err = c.Procs()
		wantErr(t, "procs", err, fs.ErrNotExist)
		_ = facts.SetOwner(1000, 1000)
		_ = facts.SetMode(0o666)
		_ = c.SetOwner(1000, 1000)
		_ = c.SetMode(0o777)
		_ = c.SetMark("x", "1")
		for _, name := range []string{"", "cgroup.procs"} {
			var st unix.Stat_t
			check(t, unix.Stat(filepath.Join(p.path, "c", name), &st))
			if st.Uid != 0 || st.Gid != 0 || st.Mode&0o22 != 0 {
				t.Errorf("the new %q is now %d:%d %o", name, st.Uid, st.Gid, st.Mode)
			}
		}
		again, err := p.dir.Open("c")
		check(t, err)
		defer again.Close()
		if after, err := again.Attr(); err != nil || after.Ino == before.Ino {
			t.Errorf("the new cgroup has the old one's number %d, %v", after.Ino, err)
		}
		if _, ok, _ := again.Mark("x"); ok {
			t.Error("the new cgroup has the old one's mark")
		}
	})
}

// On v1 a directory can be renamed while it is open; another one can be put in
// its place.
func TestKernelRenamed(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	cgtest.NoLeaks(t)
	p := newPlace(t, open(t, Options{}), "memory")
	c := mkdir(t, p.dir, "c")
	check(t, os.Rename(filepath.Join(p.path, "c"), filepath.Join(p.path, "d")))
	check(t, os.Mkdir(filepath.Join(p.path, "c"), 0o755))
	check(t, c.write("memory.limit_in_bytes", "1048576"))
	for name, limited := range map[string]bool{"c": false, "d": true} {
		b, err := os.ReadFile(filepath.Join(p.path, name, "memory.limit_in_bytes"))
		check(t, err)
		if (string(b) == "1048576\n") != limited {
			t.Errorf("%s has limit %s", name, b)
		}
	}
}

// What others mount over a cgroup, or bind into it, is not seen: the handles
// lead through a mount of our own.
func TestKernelBindMount(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		c := mkdir(t, p.dir, "c")
		d := mkdir(t, p.dir, "d")
		private(t, func() {
			check(t, unix.Mount("tmpfs", filepath.Join(p.path, "c"), "tmpfs", 0, ""))
			check(t, os.WriteFile(filepath.Join(p.path, "c", "cgroup.procs"), []byte("planted"), 0o644))
			check(t, unix.Mount("/etc", filepath.Join(p.path, "d"), "", unix.MS_BIND, ""))
			for _, name := range []string{"c", "d"} {
				x, err := p.dir.Open(name)
				check(t, err)
				if b, err := x.read("cgroup.procs", 100); err != nil || len(b) != 0 {
					t.Errorf("%s: read %q, %v", name, b, err)
				}
				_, err = x.File("hostname", ForRead)
				wantErr(t, "hostname in "+name, err, fs.ErrNotExist)
				check(t, x.Close())
			}
			for _, x := range []*Dir{c, d} {
				if b, err := x.read("cgroup.procs", 100); err != nil || len(b) != 0 {
					t.Errorf("%s: read %q, %v", x.Path(), b, err)
				}
			}
		})
	})
}

// openBeneath itself, where there is something to follow: a tree of an
// attacker's making with links and a mount.
func TestKernelOpenBeneath(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	root := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(root, "in/dir"), 0o755))
	check(t, os.WriteFile(filepath.Join(root, "secret"), nil, 0o600))
	check(t, os.WriteFile(filepath.Join(root, "in/file"), nil, 0o600))
	for link, to := range map[string]string{"up": "..", "abs": "/etc/hostname", "file-link": "file", "dir-link": "dir"} {
		check(t, os.Symlink(to, filepath.Join(root, "in", link)))
	}
	private(t, func() {
		check(t, unix.Mount("proc", filepath.Join(root, "in/dir"), "proc", 0, ""))
		defer func() { check(t, unix.Unmount(filepath.Join(root, "in/dir"), unix.MNT_DETACH)) }()
		dirfd, err := unix.Open(filepath.Join(root, "in"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, err)
		defer unix.Close(dirfd)
		fd, err := openBeneath(dirfd, "file", unix.O_RDONLY)
		check(t, err)
		check(t, unix.Close(fd))
		for path, want := range map[string]error{
			"../secret": unix.EXDEV, "..": unix.EXDEV, "/etc/hostname": unix.EXDEV, "dir/../../secret": unix.EXDEV,
			"up": unix.ELOOP, "up/secret": unix.ELOOP, "abs": unix.ELOOP, "file-link": unix.ELOOP, "dir-link": unix.ELOOP,
			"dir": unix.EXDEV, "dir/self/fd/0": unix.EXDEV, "nosuch": unix.ENOENT,
		} {
			for _, flags := range []int{unix.O_PATH, unix.O_RDONLY, unix.O_WRONLY} {
				fd, err := openBeneath(dirfd, path, flags)
				if err == nil {
					_ = unix.Close(fd)
				}
				wantErr(t, path, err, want)
			}
		}
		if _, err := os.Stat(filepath.Join(root, "in/nosuch")); err == nil {
			t.Error("nosuch was created")
		}
	})
}

// private runs f on a thread in a mount namespace of its own, which ends with
// it.
func private(t *testing.T, f func()) {
	t.Helper()
	done := make(chan bool)
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends here
		check(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
		check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		f()
	}()
	<-done
}

// What an outsider could reach through /proc is the daemon's own affair: the
// mounts are attached nowhere.
func TestKernelDetached(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	before, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	open(t, Options{})
	after, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	if string(before) != string(after) {
		t.Errorf("the mounts of this namespace changed:\n%s", after)
	}
}

// Whoever may write the parent puts a directory of somebody else's in the
// place of the one that is just being made. Mkdir notices, or was faster.
func TestKernelMkdirSwapped(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	cgtest.NoLeaks(t)
	p := newPlace(t, open(t, Options{}), "freezer")
	in := func(name string) string { return filepath.Join(p.path, name) }
	check(t, os.Mkdir(in("evil"), 0o755))
	stop, done := make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if os.Rename(in("c"), in("aside")) == nil {
				_ = os.Rename(in("evil"), in("c"))
			}
		}
	}()
	noticed := 0
	for range 1000 {
		c, err := p.dir.Mkdir("c", 1000, 1000)
		switch {
		case err != nil:
			noticed++
		default:
			if a, err := c.Attr(); err != nil || a.UID != 1000 || a.GID != 1000 {
				t.Errorf("Mkdir returned a directory of %d:%d, %v", a.UID, a.GID, err)
			}
			check(t, c.Close())
		}
		// Tidy up: whatever is 1000's goes, evil goes back.
		for _, name := range []string{"c", "aside"} {
			var st unix.Stat_t
			if unix.Stat(in(name), &st) == nil && st.Uid == 0 {
				_ = os.Rename(in(name), in("evil"))
			}
			_ = os.Remove(in(name))
		}
		if _, err := os.Stat(in("evil")); err != nil {
			_ = os.Mkdir(in("evil"), 0o755)
		}
	}
	close(stop)
	<-done
	t.Logf("noticed %d of 1000", noticed)
}
