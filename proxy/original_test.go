package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/api/client"
	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
	"cgmanager/proxy"
	"cgmanager/test/harness"
)

// exchange is a call of the original daemon's, as it was recorded of version
// 0.42: how often it kicked, and what it sent then.
type exchange struct {
	method string
	args   []any // strings and int32s, before the socket
	kicks  int
	sent   []string
}

func (x exchange) recorded() harness.Recorded {
	return harness.Recorded{Method: x.method, Args: x.args, Kicks: x.kicks, Sent: x.sent}
}

// Below the original daemon plain calls become calls with a side channel, in its
// own form, and its answers are those of the plain calls.
func TestOriginal(t *testing.T) {
	self := api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	none := errors.New("org.freedesktop.DBus.Error.InvalidArgs")
	ctx := context.Background()
	pid := self.PID
	type result struct {
		value any
		err   error
	}
	only := func(err error) result { return result{nil, err} }
	one := func(v any, err error) result { return result{v, err} }
	for _, tc := range []struct {
		exchange
		call  func(c *client.Client) result
		value any
		err   error
	}{
		{
			exchange{"CreateScm", []any{"memory", "scmx"}, 1, []string{"1"}},
			func(c *client.Client) result { return one(c.Create0(ctx, "memory", "scmx")) }, api.DidNotExist, nil,
		},
		{
			exchange{"CreateScm", []any{"memory", "scmx"}, 1, []string{"2"}},
			func(c *client.Client) result { return one(c.Create0(ctx, "memory", "scmx")) }, api.DidExist, nil,
		},
		{
			exchange{"CreateScm", []any{"memory", "../x"}, 1, []string{"0"}},
			func(c *client.Client) result { return one(c.Create0(ctx, "memory", "../x")) }, nil, none,
		},
		{
			exchange{"MovePidScm", []any{"memory", "scmx"}, 2, []string{"1"}},
			func(c *client.Client) result { return only(c.MovePid0(ctx, "memory", "scmx", pid)) }, nil, nil,
		},
		{
			exchange{"MovePidScm", []any{"memory", "nosuch"}, 2, []string{"0"}},
			func(c *client.Client) result { return only(c.MovePid0(ctx, "memory", "nosuch", pid)) }, nil, none,
		},
		{
			exchange{"MovePidAbsScm", []any{"memory", "/scmx"}, 2, []string{"1"}},
			func(c *client.Client) result { return only(c.MovePidAbs0(ctx, "memory", "/scmx", pid)) }, nil, nil,
		},
		{
			exchange{"GetPidCgroupScm", []any{"memory"}, 2, []string{"scmx\x00"}},
			func(c *client.Client) result { return one(c.GetPidCgroup0(ctx, "memory", pid)) }, "scmx", nil,
		},
		{
			exchange{"GetPidCgroupAbsScm", []any{"memory"}, 2, []string{"/scmx\x00"}},
			func(c *client.Client) result { return one(c.GetPidCgroupAbs0(ctx, "memory", pid)) }, "/scmx", nil,
		},
		{
			exchange{"GetPidCgroupScm", []any{"nosuch"}, 2, []string{""}},
			func(c *client.Client) result { return one(c.GetPidCgroup0(ctx, "nosuch", pid)) }, nil, none,
		},
		// The test sends its own credential with each byte, as the daemon did a
		// task's.
		{
			exchange{"GetTasksScm", []any{"memory", "scmx"}, 1, []string{"\x01\x00\x00\x00", "p"}},
			func(c *client.Client) result { return one(c.GetTasks0(ctx, "memory", "scmx")) },
			[]int32{pid},
			nil,
		},
		{
			exchange{"GetTasksScm", []any{"memory", "nosuch"}, 1, []string{"\xff\xff\xff\xff"}},
			func(c *client.Client) result { return one(c.GetTasks0(ctx, "memory", "nosuch")) }, nil, none,
		},
		{
			exchange{"GetTasksRecursiveScm", []any{"memory", "scmx"}, 1, []string{"\x02\x00\x00\x00", "p", "p"}},
			func(c *client.Client) result { return one(c.GetTasksRecursive0(ctx, "memory", "scmx")) },
			[]int32{pid, pid},
			nil,
		},
		{
			exchange{"GetValueScm", []any{"memory", "scmx", "memory.limit_in_bytes"}, 1, []string{"9223372036854771712\x00"}},
			func(c *client.Client) result { return one(c.GetValue0(ctx, "memory", "scmx", "memory.limit_in_bytes")) }, "9223372036854771712", nil,
		},
		{
			exchange{"GetValueScm", []any{"memory", "scmx", "nosuch"}, 1, []string{""}},
			func(c *client.Client) result { return one(c.GetValue0(ctx, "memory", "scmx", "nosuch")) }, nil, none,
		},
		{
			exchange{"SetValueScm", []any{"memory", "scmx", "memory.limit_in_bytes", "50000000"}, 1, []string{"1"}},
			func(c *client.Client) result {
				return only(c.SetValue0(ctx, "memory", "scmx", "memory.limit_in_bytes", "50000000"))
			}, nil, nil,
		},
		{
			exchange{"SetValueScm", []any{"memory", "scmx", "memory.limit_in_bytes", "junk"}, 1, []string{"0"}},
			func(c *client.Client) result {
				return only(c.SetValue0(ctx, "memory", "scmx", "memory.limit_in_bytes", "junk"))
			}, nil, none,
		},
		{
			exchange{"ChownScm", []any{"memory", "scmx"}, 2, []string{"1"}},
			func(c *client.Client) result {
				return only(c.Chown0(ctx, "memory", "scmx", int32(self.UID), int32(self.GID)))
			}, nil, nil,
		},
		{
			exchange{"ChmodScm", []any{"memory", "scmx", "tasks", int32(436)}, 1, []string{"1"}},
			func(c *client.Client) result { return only(c.Chmod0(ctx, "memory", "scmx", "tasks", 436)) }, nil, nil,
		},
		{
			exchange{"ChmodScm", []any{"memory", "scmx", "nosuch", int32(436)}, 1, []string{"0"}},
			func(c *client.Client) result { return only(c.Chmod0(ctx, "memory", "scmx", "nosuch", 436)) }, nil, none,
		},
		{
			exchange{"ListChildrenScm", []any{"memory", "scmx"}, 1, []string{"\x02\x00\x00\x00", "\x06\x00\x00\x00", "k1\x00k2\x00"}},
			func(c *client.Client) result { return one(c.ListChildren0(ctx, "memory", "scmx")) },
			[]string{"k1", "k2"},
			nil,
		},
		{
			exchange{"ListChildrenScm", []any{"memory", "scmx/k1"}, 1, []string{"\x00\x00\x00\x00"}},
			func(c *client.Client) result { return one(c.ListChildren0(ctx, "memory", "scmx/k1")) },
			[]string{},
			nil,
		},
		{
			exchange{"ListKeysScm", []any{"memory", "scmx"}, 1, []string{
				"\x02\x00\x00\x00", "\x00\x04\x00\x00",
				"cgroup.procs\n0\n0\n33188\nmemory.kmem.tcp.usage_in_bytes\n4294967295\n-1\n33060\n" + strings.Repeat("\x00", 1024-74),
			}},
			func(c *client.Client) result { return one(c.ListKeys0(ctx, "memory", "scmx")) },
			[]api.Key{{Name: "cgroup.procs", Mode: 33188}, {Name: "memory.kmem.tcp.usage_in_bytes", UID: api.NoID, GID: api.NoID, Mode: 33060}},
			nil,
		},
		{
			exchange{"ListKeysScm", []any{"memory", "nosuch"}, 1, []string{"\xff\xff\xff\xff"}},
			func(c *client.Client) result { return one(c.ListKeys0(ctx, "memory", "nosuch")) }, nil, none,
		},
		{
			exchange{"RemoveOnEmptyScm", []any{"memory", "scmx"}, 1, []string{"0"}},
			func(c *client.Client) result { return only(c.RemoveOnEmpty0(ctx, "memory", "scmx")) }, nil, none,
		},
		{
			exchange{"PruneScm", []any{"memory", "nosuch"}, 1, []string{"0"}},
			func(c *client.Client) result { return only(c.Prune0(ctx, "memory", "nosuch")) }, nil, none,
		},
		{
			exchange{"RemoveScm", []any{"memory", "scmx", int32(0)}, 1, []string{"0"}},
			func(c *client.Client) result { return one(c.Remove0(ctx, "memory", "scmx", false)) }, nil, none,
		},
		{
			exchange{"RemoveScm", []any{"memory", "scmx", int32(1)}, 1, []string{"2"}},
			func(c *client.Client) result { return one(c.Remove0(ctx, "memory", "scmx", true)) }, api.DidExist, nil,
		},
		{
			exchange{"RemoveScm", []any{"memory", "scmx", int32(1)}, 1, []string{"1"}},
			func(c *client.Client) result { return one(c.Remove0(ctx, "memory", "scmx", true)) }, api.DidNotExist, nil,
		},
	} {
		t.Run(tc.method+tc.sent[0], func(t *testing.T) {
			o := harness.StartOriginal(t, 10, tc.recorded())
			c := dial(t, start(t, o.Path, 0))
			got := tc.call(c)
			var refusal *client.Error
			switch {
			case tc.err == nil && got.err != nil:
				t.Fatal(got.err)
			case tc.err == nil && tc.value != nil && !reflect.DeepEqual(got.value, tc.value):
				t.Errorf("got %#v, want %#v", got.value, tc.value)
			case tc.err != nil && (!errors.As(got.err, &refusal) || refusal.Name != tc.err.Error() || !strings.HasPrefix(refusal.Text, "invalid request: ")):
				t.Errorf("got %#v, %v", got.value, got.err)
			}
			own := harness.Cred{PID: self.PID, UID: self.UID, GID: self.GID}
			want := []harness.Cred{own, own}[:tc.kicks]
			if told := o.Told(); !reflect.DeepEqual(told, want) {
				t.Errorf("it was told of %v, want %v", told, want)
			}
		})
	}
}

// What the original daemon does not know, the client learns.
func TestOriginalCannot(t *testing.T) {
	o := harness.StartOriginal(t, 10)
	c := dial(t, start(t, o.Path, 0))
	if got, err := c.ListControllers0(t.Context()); err != nil || len(got) != 13 || got[12] != "name=systemd" {
		t.Errorf("ListControllers: %q, %v", got, err)
	}
	_, err := c.Create(t.Context(), "x", nil, nil)
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Name != "org.freedesktop.DBus.Error.NotSupported" || !strings.Contains(refusal.Text, "original") {
		t.Errorf("Create: %v", err)
	}
	err = c.Chown0(t.Context(), "memory", "x", 7, -1)
	if !errors.As(err, &refusal) || !strings.Contains(refusal.Text, "both ids at once") {
		t.Errorf("Chown: %v", err)
	}
}

// A proxy says what it finds below instead of a daemon that it can use.
func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		name  string
		lower func(t *testing.T) string
		want  string
	}{
		{"nothing", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, "no such file or directory"},
		{"stale", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "stale")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
			return path
		}, "connection refused"},
		{"another version", func(t *testing.T) string {
			return harness.StartOriginal(t, 9).Path
		}, "api_version is 9, and 10 is needed"},
		{"no D-Bus", func(t *testing.T) string {
			return speak(t, "220 mail.example.org ESMTP\r\n")
		}, "answers the login"},
		{"another service", func(t *testing.T) string {
			return speak(t, "DATA\r\nOK 6426d77e283b8d96d92760be6b0280a3\r\nAGREE_UNIX_FD\r\n"+
				string(wire.AppendError(nil, 1, 1, "org.freedesktop.DBus.Error.UnknownMethod", "no such thing")))
		}, "not a cgmanager"},
		{"rejected", func(t *testing.T) string { return speak(t, "REJECTED EXTERNAL\r\n") }, "REJECTED"},
		{"garbage", func(t *testing.T) string {
			return speak(t, "DATA\r\nOK 6426d77e283b8d96d92760be6b0280a3\r\nAGREE_UNIX_FD\r\nl\x02\x01\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff")
		}, "malformed"},
		{"endless line", func(t *testing.T) string { return speak(t, strings.Repeat("x", 1<<20)) }, "does not speak D-Bus"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := proxy.New(proxy.Config{Lower: tc.lower(t)}).Check()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	found, err := proxy.New(proxy.Config{Lower: harness.StartOriginal(t, 10).Path}).Check()
	if err != nil || !found.Original || found.PID != int32(os.Getpid()) {
		t.Errorf("the original: %+v, %v", found, err)
	}
}

// speak listens, and says the same to everybody.
func speak(t *testing.T, what string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "speak")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte(what))
			buf := make([]byte, 4096)
			for err == nil {
				_, err = c.Read(buf)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return path
}

// Below the original daemon a connection is its opener's alone: another process
// would be judged without the opener, and its numbers read as the opener's.
func TestOriginalOpener(t *testing.T) {
	sock := start(t, harness.StartOriginal(t, 10).Path, 0)
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(cgtest.Patience(20 * time.Second))); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("\x00AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")); err != nil {
		t.Fatal(err)
	}
	e := wire.NewCall(nil, 1, api.ObjectPath, api.Interface0, "Chown", "ssii", 0)
	e.String("memory")
	e.String("x")
	e.Int32(0)
	e.Int32(0)
	call, err := e.End()
	if err != nil {
		t.Fatal(err)
	}
	inherited, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	defer inherited.Close()
	other := exec.Command("cat")
	other.Stdin, other.Stdout = bytes.NewReader(call), inherited
	if err := other.Run(); err != nil {
		t.Fatal(err)
	}
	var in []byte
	for buf := make([]byte, 4096); !bytes.Contains(in, []byte(".Error.")); {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("%q, %v", in, err)
		}
		in = append(in, buf[:n]...)
	}
	if !bytes.Contains(in, []byte("a connection's opener alone")) {
		t.Errorf("%q", in)
	}
}
