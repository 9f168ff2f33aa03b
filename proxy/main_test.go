package proxy_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/api/client"
	"cgmanager/api/server"
	"cgmanager/cgfs/cgtest"
	"cgmanager/proxy"
)

// start serves a proxy of the daemon at lower and returns its socket. At the end
// nothing of it may be left: no file, no goroutine.
func start(t *testing.T, lower string, wait time.Duration) (sock string) {
	t.Helper()
	leavesNothing(t)
	return serveProxy(t, lower, wait)
}

func serveProxy(t *testing.T, lower string, wait time.Duration) (sock string) {
	t.Helper()
	p := proxy.New(proxy.Config{Lower: lower, Wait: wait})
	return serve(t, p, p.End)
}

// serve serves the backend and returns its socket; end is called at the end,
// before the server's.
func serve(t *testing.T, b api.Backend, end func()) (sock string) {
	t.Helper()
	sock = filepath.Join(t.TempDir(), "sock")
	l, err := server.Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Config{Backend: b, Listeners: []*server.Listener{l}, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		end()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return sock
}

// leavesNothing checks at the end that what was opened and started since is gone.
func leavesNothing(t *testing.T) {
	t.Helper()
	files, goroutines := count(t), runtime.NumGoroutine()
	t.Cleanup(func() {
		var what string
		if !cgtest.Until(2*time.Second, 10*time.Millisecond, func() bool {
			what = left(t, files, goroutines)
			return what == ""
		}) {
			t.Error(what)
		}
	})
}

func left(t *testing.T, files, goroutines int) string {
	if n := count(t); n > files {
		return fmt.Sprintf("%d files open, %d in the beginning", n, files)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		buf := make([]byte, 64<<10)
		return fmt.Sprintf("%d goroutines, %d in the beginning\n%s", n, goroutines, buf[:runtime.Stack(buf, true)])
	}
	return ""
}

func count(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func dial(t *testing.T, sock string) *client.Client {
	t.Helper()
	c, err := client.DialAddress(t.Context(), "unix:path="+sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
