package cgfs

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// floor times f, which does the bare system calls, for about as long as the
// benchmark ran, and reports how many times as much the benchmark took.
func floor(b *testing.B, f func()) {
	b.StopTimer()
	spent := b.Elapsed()
	n := max(1, b.N)
	start := time.Now()
	for range n {
		f()
	}
	b.ReportMetric(float64(spent)/float64(time.Since(start)), "x-floor")
	b.ReportMetric(0, "ns/op") // times of this machine mean nothing elsewhere
}

func benchPlace(b *testing.B) place {
	cgtest.Require(b, cgtest.Root, cgtest.V1)
	b.ReportAllocs()
	return newPlace(b, open(b, Options{}), "memory")
}

func must(b *testing.B, err error) {
	if err != nil {
		b.Fatal(err)
	}
}

func bareMkdir(b *testing.B, d *Dir) func() {
	return func() {
		must(b, unix.Mkdirat(d.fd, "c", 0o755))
		must(b, unix.Unlinkat(d.fd, "c", unix.AT_REMOVEDIR))
	}
}

func BenchmarkMkdirRmdir(b *testing.B) {
	for name, id := range map[string]uint32{"root": 0, "owner": 100000} {
		b.Run(name, func(b *testing.B) {
			p := benchPlace(b)
			for b.Loop() {
				c, err := p.dir.Mkdir("c", id, id)
				must(b, err)
				must(b, c.Close())
				must(b, p.dir.Rmdir("c"))
			}
			floor(b, bareMkdir(b, p.dir))
		})
	}
	// What Mkdir avoids: a chown of every file.
	b.Run("chowns", func(b *testing.B) {
		p := benchPlace(b)
		files, err := p.dir.Files()
		must(b, err)
		for b.Loop() {
			c, err := p.dir.Mkdir("c", 0, 0)
			must(b, err)
			must(b, c.SetOwner(100000, 100000))
			for _, f := range files {
				must(b, unix.Fchownat(c.fd, f, 100000, 100000, unix.AT_SYMLINK_NOFOLLOW))
			}
			must(b, c.Close())
			must(b, p.dir.Rmdir("c"))
		}
		floor(b, bareMkdir(b, p.dir))
	})
}

func BenchmarkRead(b *testing.B) {
	p := benchPlace(b)
	for b.Loop() {
		f, err := p.dir.File(memory1, ForRead)
		must(b, err)
		_, err = f.Read(4096)
		must(b, err)
		must(b, f.Close())
	}
	var buf [4096]byte
	floor(b, func() {
		fd, err := unix.Openat(p.dir.fd, memory1, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(b, err)
		_, err = unix.Read(fd, buf[:])
		must(b, err)
		must(b, unix.Close(fd))
	})
}

func BenchmarkOpenDir(b *testing.B) {
	p := benchPlace(b)
	for b.Loop() {
		d, err := p.h.Open(p.dir.path)
		must(b, err)
		must(b, d.Close())
	}
	floor(b, func() {
		fd, err := unix.Openat(p.h.fd, p.dir.path[1:], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(b, err)
		must(b, unix.Close(fd))
	})
}
