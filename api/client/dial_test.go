package client

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"cgmanager/cgfs/cgtest"
)

func TestAddresses(t *testing.T) {
	t.Setenv(AddressVariable, "")
	want := []string{
		"unix:path=/sys/fs/cgroup/manager",
		"unix:path=/sys/fs/cgroup/cgmanager/sock",
		"unix:path=/run/cgmanager/sock",
	}
	if got := Addresses(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	t.Setenv(AddressVariable, "/tmp/sock")
	if got := Addresses(); !slices.Equal(got, []string{"/tmp/sock"}) {
		t.Errorf("with %s: got %q", AddressVariable, got)
	}
}

func TestParseAddress(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"unix:path=/a", "unix:path=/a"},
		{"unix:abstract=x;unix:path=/a", "unix:abstract=x;unix:path=/a"},
		{"/a", "unix:path=/a"},
		{"/a,b;c=d", "unix:path=/a%2cb%3bc%3dd"},
		{"", ""},
		{"a", ""},
		{"tcp:host=localhost,port=1", ""},
		{"unixexec:path=/bin/sh", ""},
		{"unix:path=/a;unixexec:path=/bin/sh", ""},
		{"unix:path=/a;", ""},
	} {
		got, err := parseAddress(c.in)
		if strings.Join(got, ";") != c.want || (err == nil) != (c.want != "") {
			t.Errorf("parseAddress(%q) = %q, %v; want %q", c.in, got, err, c.want)
		}
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()

	_, err = DialAddress(t.Context(), filepath.Join(dir, "none"), stale)
	unreachable, ok := errors.AsType[*UnreachableError](err)
	if !ok {
		t.Fatalf("got %v, want an UnreachableError", err)
	}
	if len(unreachable.Tried) != 2 || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("tried %q", unreachable.Tried)
	}
	for _, want := range []string{dir + "/none: no such file or directory", stale + ": connection refused"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
	if unreachable.Hint() == "" {
		t.Error("no hint")
	}
}

// listen serves each connection with handle, in a goroutine of its own.
func listen(t *testing.T, handle func(net.Conn)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c)
		}
	}()
	return path
}

// A daemon that takes the connection and never answers does not hold the
// client beyond its deadline.
func TestDeadline(t *testing.T) {
	held := make(chan net.Conn, 1)
	path := listen(t, func(c net.Conn) { held <- c })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := DialAddress(ctx, path)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
	if err != nil && !strings.HasSuffix(err.Error(), path+": no answer in time") {
		t.Errorf("it is told as %q", err)
	}
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("it took %v", d)
	}
	(<-held).Close()
}

// One that closes at once is an error that names the address.
func TestClosedAtOnce(t *testing.T) {
	path := listen(t, func(c net.Conn) { c.Close() })
	_, err := DialAddress(t.Context(), path)
	told, ok := errors.AsType[*loginError](err)
	if !ok || !strings.Contains(err.Error(), path+": it closed the connection") || told.Hint() == "" {
		t.Errorf("got %v", err)
	}
}

func TestCallError(t *testing.T) {
	const notFound = "org.freedesktop.DBus.Error.FileNotFound"
	for _, c := range []struct {
		name             string
		err              error
		text, hint, dbus string
	}{
		{"plain", dbus.Error{Name: notFound, Body: []any{"no cgroup \"a\""}}, `no cgroup "a"`, "", notFound},
		{"hint", dbus.Error{Name: notFound, Body: []any{"no cgroup (hint: make one)"}}, "no cgroup", "make one", notFound},
		{"no hint", dbus.Error{Name: notFound, Body: []any{"a (hint: b) c"}}, "a (hint: b) c", "", notFound},
		{"no text", dbus.Error{Name: notFound}, notFound, "", notFound},
		{"no string", dbus.Error{Name: notFound, Body: []any{int32(1)}}, notFound, "", notFound},
		{"closed", dbus.ErrClosed, "Create: the daemon had closed the connection: it ended, or was replaced", "", ""},
		{"late", context.DeadlineExceeded, "Create: no reply in time", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := callError("Create", c.err)
			if err.Error() != c.text {
				t.Errorf("text %q, want %q", err, c.text)
			}
			refusal, ok := errors.AsType[*Error](err)
			if ok != (c.dbus != "") {
				t.Fatalf("a refusal: %v", ok)
			}
			if ok && (refusal.Hint() != c.hint || refusal.Name != c.dbus) {
				t.Errorf("hint %q, name %q", refusal.Hint(), refusal.Name)
			}
			if IsNotFound(err) != ok {
				t.Errorf("IsNotFound: %v", !ok)
			}
		})
	}
}

// A daemon that goes away, at one moment or another: whoever asks is told whether
// the request may have been carried out. One that goes while it is logged in to
// is dialled again.
func TestGone(t *testing.T) {
	for _, c := range []struct {
		name string
		// leave is what a daemon does when a client has logged in.
		leave   func(c *net.UnixConn)
		notSent bool
	}{
		{"closed", func(c *net.UnixConn) { _ = c.Close() }, true},
		{"draining", func(c *net.UnixConn) { _ = c.CloseRead() }, true},
		{"asked", func(c *net.UnixConn) {
			go func() {
				_, _ = c.Read(make([]byte, 1))
				_ = c.Close()
			}()
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			sock := filepath.Join(t.TempDir(), "sock")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			left := make(chan struct{})
			go func() {
				defer close(left)
				// The first one goes at once.
				first, err := l.AcceptUnix()
				if err != nil {
					t.Error(err)
					return
				}
				_ = first.Close()
				conn, err := l.AcceptUnix()
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(func() { _ = conn.Close() })
				answers := map[string]string{
					"\x00AUTH": "REJECTED EXTERNAL\r\n", "AUTH": "OK 00\r\n", "NEGOTIATE_UNIX_FD": "AGREE_UNIX_FD\r\n",
				}
				r := bufio.NewReader(conn)
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						t.Error(err)
						return
					}
					word := strings.Fields(line)[0]
					if word == "BEGIN" {
						c.leave(conn)
						return
					}
					if _, err := conn.Write([]byte(answers[word])); err != nil {
						t.Error(err)
					}
				}
			}()
			cl, err := DialAddress(t.Context(), sock)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cl.Close() }()
			<-left
			if c.name == "closed" {
				// Else the end may come when the request is on its way, and nobody
				// can know.
				<-cl.conn.Context().Done()
			}
			err = cl.Kill(t.Context(), "x")
			if gone, ok := errors.AsType[*GoneError](err); !ok || gone.NotSent != c.notSent {
				t.Errorf("got %v", err)
			}
			if strings.Contains(err.Error(), sock) {
				t.Errorf("the text is for nobody: %v", err)
			}
		})
	}
}
