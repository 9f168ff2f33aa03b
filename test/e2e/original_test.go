package e2e_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// turn is what a client of sasl-0.42.txt says, and what it is answered.
type turn struct {
	line      int
	say, hear []byte
	// ours is the answer where it differs on purpose.
	ours   []byte
	closed bool
}

// readLogins reads the connections of sasl-0.42.txt.
func readLogins(t *testing.T) (all [][]turn) {
	t.Helper()
	b, err := os.ReadFile("testdata/sasl-0.42.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	var one []turn
	for line := range strings.Lines(string(b) + "\n") {
		n++
		line = strings.TrimSuffix(line, "\n")
		kind, rest, _ := strings.Cut(line, " ")
		switch {
		case strings.HasPrefix(line, "#"):
		case line == "":
			if one != nil {
				all, one = append(all, one), nil
			}
		case kind == "C:":
			one = append(one, turn{line: n, say: saslBytes(t, rest)})
		case kind == "S:":
			one[len(one)-1].hear = saslBytes(t, rest)
		case kind == "ours:":
			one[len(one)-1].ours = saslBytes(t, rest)
		case kind == "closed":
			one[len(one)-1].closed = true
		default:
			t.Fatalf("line %d: %q", n, line)
		}
	}
	return all
}

var saslToken = regexp.MustCompile(`^(?:("(?:[^"\\]|\\.)*")|(QUIET-)?PING-(\d)|EMPTY-(\d)-(\d))(?:\s+|$)`)

// saslBytes reads quoted strings and the names of messages, up to a "#".
func saslBytes(t *testing.T, line string) (bs []byte) {
	t.Helper()
	for line != "" && line[0] != '#' {
		m := saslToken.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("sasl-0.42.txt: %q", line)
		}
		line = line[len(m[0]):]
		switch {
		case m[1] != "":
			s, err := strconv.Unquote(m[1])
			if err != nil {
				t.Fatal(err)
			}
			bs = append(bs, s...)
		case m[3] != "":
			flags := dbus.Flags(0)
			if m[2] != "" {
				flags = dbus.FlagNoReplyExpected
			}
			bs = append(bs, message(t, binary.LittleEndian, uint32(m[3][0]-'0'), flags, fields(harness.V0, "Ping"), int32(0))...)
		default:
			bs = append(bs, emptyReply(m[4][0]-'0', m[5][0]-'0')...)
		}
	}
	return bs
}

var guid = regexp.MustCompile(`\bOK [0-9a-f]{32}\r\n`)

// TestKernelReferenceSASL: logins are answered as libdbus answered them for the
// original, to the byte.
func TestKernelReferenceSASL(t *testing.T) {
	logins := readLogins(t)
	if len(logins) != 7 {
		t.Fatalf("%d connections", len(logins))
	}
	doors(t, func(w *world) {
		p := w.host(0, ".")
		for _, login := range logins {
			fd := p.Socket(unix.SOCK_STREAM)
			if err := p.Connect(fd, w.sock()); err != nil {
				w.Fatal(err)
			}
			for _, turn := range login {
				if bytes.Contains(turn.say, []byte("BEGIN\r\nl")) && bytes.HasPrefix(turn.say, []byte{0}) && !harness.Pipelines() {
					continue
				}
				w.takeTurn(p, fd, turn)
			}
			p.Close(fd)
		}
	})
}

// takeTurn says something and hears the answer.
func (w *world) takeTurn(p *harness.Proc, fd int, turn turn) {
	w.Helper()
	want := turn.hear
	if turn.ours != nil {
		want = turn.ours
	}
	if err := p.Send(fd, turn.say, nil); err != nil {
		w.Errorf("line %d: %v", turn.line, err)
		return
	}
	var got []byte
	for len(got) < len(want) || turn.closed {
		d, err := p.Recv(fd, 5*time.Second)
		if turn.closed && (errors.Is(err, unix.ECONNRESET) || err == nil && len(d.Data) == 0) {
			return
		}
		if err != nil || len(d.Data) == 0 {
			w.Errorf("line %d: after %q: %v", turn.line, got, err)
			return
		}
		got = guid.ReplaceAll(append(got, d.Data...), []byte("OK GUID\r\n"))
	}
	if !bytes.Equal(got, want) {
		w.Errorf("line %d: %q is answered by %q, want %q", turn.line, turn.say, got, want)
	}
}

// Below the original daemon a proxy names its clients, their victims and new owners
// by the kernel's own word, and hands on what it is answered.
func TestKernelProxyOriginal(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	u, v := b.user(7), b.user(7)
	self := harness.Cred{PID: int32(u.HostPID), UID: u.HostUID, GID: u.HostGID}
	// Of a victim the number counts alone: the ids are those that the proxy has.
	victim := harness.Cred{PID: int32(v.HostPID), UID: b.HostUID, GID: b.HostGID}
	v0 := func(member string, args ...any) []any { return append([]any{member}, args...) }
	for _, tc := range []struct {
		call     []any
		recorded harness.Recorded
		told     []harness.Cred
		answer   []any // nil is refused
	}{
		{
			v0("Create", "memory", "scmx"),
			harness.Recorded{Method: "CreateScm", Args: []any{"memory", "scmx"}, Kicks: 1, Sent: []string{"1"}},
			[]harness.Cred{self},
			[]any{int32(-1)},
		},
		{
			v0("Create", "memory", "../x"),
			harness.Recorded{Method: "CreateScm", Args: []any{"memory", "../x"}, Kicks: 1, Sent: []string{"0"}},
			[]harness.Cred{self},
			nil,
		},
		{
			v0("MovePid", "memory", "scmx", v.NSpid()[1]),
			harness.Recorded{Method: "MovePidScm", Args: []any{"memory", "scmx"}, Kicks: 2, Sent: []string{"1"}},
			[]harness.Cred{self, victim},
			[]any{},
		},
		{
			v0("MovePidAbs", "memory", "/", v.NSpid()[1]),
			harness.Recorded{Method: "MovePidAbsScm", Args: []any{"memory", "/"}, Kicks: 2, Sent: []string{"1"}},
			[]harness.Cred{self, victim},
			[]any{},
		},
		{
			v0("GetPidCgroup", "memory", v.NSpid()[1]),
			harness.Recorded{Method: "GetPidCgroupScm", Args: []any{"memory"}, Kicks: 2, Sent: []string{"scmx\x00"}},
			[]harness.Cred{self, victim},
			[]any{"scmx"},
		},
		{
			v0("GetPidCgroup", "nosuch", v.NSpid()[1]),
			harness.Recorded{Method: "GetPidCgroupScm", Args: []any{"nosuch"}, Kicks: 2, Sent: []string{""}},
			[]harness.Cred{self, victim},
			nil,
		},
		{
			v0("GetTasks", "memory", "scmx"),
			harness.Recorded{Method: "GetTasksScm", Args: []any{"memory", "scmx"}, Kicks: 1, Sent: []string{"\x01\x00\x00\x00", "p"}, Task: v.HostPID},
			[]harness.Cred{self},
			[]any{[]int32{v.NSpid()[1]}},
		},
		{
			// Two that the container does not see are 0, as recorded behind the
			// original's proxy.
			v0("GetTasksRecursive", "memory", ""),
			harness.Recorded{Method: "GetTasksRecursiveScm", Args: []any{"memory", ""}, Kicks: 1, Sent: []string{"\x02\x00\x00\x00", "p", "p"}},
			[]harness.Cred{self},
			[]any{[]int32{0, 0}},
		},
		{
			v0("GetValue", "memory", "scmx", "memory.limit_in_bytes"),
			harness.Recorded{Method: "GetValueScm", Args: []any{"memory", "scmx", "memory.limit_in_bytes"}, Kicks: 1, Sent: []string{"9223372036854771712\x00"}},
			[]harness.Cred{self},
			[]any{"9223372036854771712"},
		},
		{
			v0("Chown", "memory", "scmx", int32(1000), int32(1001)),
			harness.Recorded{Method: "ChownScm", Args: []any{"memory", "scmx"}, Kicks: 2, Sent: []string{"1"}},
			[]harness.Cred{self, {PID: self.PID, UID: b.first + 1000, GID: b.first + 1001}},
			[]any{},
		},
		{
			v0("ListChildren", "memory", "scmx"),
			harness.Recorded{Method: "ListChildrenScm", Args: []any{"memory", "scmx"}, Kicks: 1, Sent: []string{"\x02\x00\x00\x00", "\x06\x00\x00\x00", "k1\x00k2\x00"}},
			[]harness.Cred{self},
			[]any{[]string{"k1", "k2"}},
		},
		{
			v0("Remove", "memory", "scmx", int32(1)),
			harness.Recorded{Method: "RemoveScm", Args: []any{"memory", "scmx", int32(1)}, Kicks: 1, Sent: []string{"2"}},
			[]harness.Cred{self},
			[]any{int32(1)},
		},
	} {
		t.Run(fmt.Sprint(tc.call...), func(t *testing.T) {
			o := harness.StartOriginal(t, 10, tc.recorded)
			x := startProxy(t, b.Proc, o.Path)
			c := u.MustDial(x.sock)
			defer c.Close()
			got, err := c.V0(tc.call[0].(string), tc.call[1:]...)
			var refusal *harness.DBusError
			switch {
			case tc.answer == nil:
				if !errors.As(err, &refusal) || refusal.Name != "org.freedesktop.DBus.Error.InvalidArgs" || !strings.HasPrefix(refusal.Text, "invalid request: ") {
					t.Errorf("got %v, %v", got, err)
				}
			case err != nil || len(got)+len(tc.answer) > 0 && !reflect.DeepEqual(got, tc.answer):
				t.Errorf("got %#v, %v, want %#v", got, err, tc.answer)
			}
			want(t, "what it was told", o.Told(), tc.told)
		})
	}

	// A container further in, whose numbers the original does not know.
	o := harness.StartOriginal(t, 10, harness.Recorded{Method: "CreateScm", Kicks: 1, Sent: []string{"1"}})
	x := startProxy(t, b.Proc, o.Path)
	inner := b.box("c2")
	c := inner.MustDial(x.sock)
	defer c.Close()
	want(t, "Create", asker{t, c}.v0("Create", "memory", "x"), []any{int32(-1)})
	want(t, "what it was told", o.Told(), []harness.Cred{{PID: int32(inner.HostPID), UID: inner.HostUID, GID: inner.HostGID}})
	w.refused("a number of another pid namespace", func() error { return second(c.V0("MovePid", "memory", "x", int32(1))) })
}
