package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/client"
	"cgmanager/test/harness"
)

// granter is a daemon below that answers requests of realtime with what it was
// asked, and remembers who asked.
type granter struct {
	api.Backend
	err error // how requests end
	mu  sync.Mutex
	// asked and senders are of each request, hops of each ActFor; guarded by mu.
	asked         []string
	senders, hops []api.Cred
}

type anybody struct{}

func (anybody) AcceptsIdentity(uint32) bool { return true }
func (anybody) Accounts() []string          { return nil }
func (anybody) Close()                      {}

func (g *granter) Open(_ api.Cred, pidfd int) (api.Peer, error) {
	return anybody{}, unix.Close(pidfd)
}

func (g *granter) ActFor(rq *api.Request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hops = append(g.hops, rq.Sender)
	return nil
}

func (g *granter) note(rq *api.Request, asked ...any) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, fmt.Sprintf("%+v", asked))
	g.senders = append(g.senders, rq.Sender)
	return g.err
}

func (g *granter) RealtimeRefused(*api.Request) error { return nil }

func (g *granter) MakeThreadRealtime(rq *api.Request, t api.Thread, priority uint32) error {
	return g.note(rq, "realtime", t, priority)
}

func (g *granter) MakeThreadHighPriority(rq *api.Request, t api.Thread, nice int32) error {
	return g.note(rq, "nice", t, nice)
}

func (g *granter) ResetKnown(rq *api.Request) error { return g.note(rq, "reset known") }
func (g *granter) ResetAll(rq *api.Request) error   { return g.note(rq, "reset all") }
func (g *granter) Exit(rq *api.Request) error       { return g.note(rq, "exit") }

var bounds = api.RealtimeProperties{RTTimeUSecMax: 1<<40 + 1, MaxRealtimePriority: 20, MinNiceLevel: -15}

func (g *granter) RealtimeProperties(rq *api.Request) (api.RealtimeProperties, error) {
	return bounds, g.note(rq, "properties")
}

var granted = []api.Grant{
	{PID: 1, TID: 2, UID: 3, Policy: "fifo", Level: 4, Since: 1 << 40, CPU: 1<<63 + 5, State: "granted"},
	{PID: 6, UID: api.NoID, Policy: "limits", Level: -7, Since: -8, State: "demoted"},
}

func (g *granter) ListGrants(rq *api.Request) ([]api.Grant, error) {
	return granted, g.note(rq, "list")
}

func (g *granter) Grant(rq *api.Request, thread uint32, policy string, level int32) error {
	return g.note(rq, "grant", thread, policy, level)
}

func (g *granter) Revoke(rq *api.Request, thread uint32) error { return g.note(rq, "revoke", thread) }

func (g *granter) GrantLimits(rq *api.Request, pid uint32) (map[string]string, error) {
	return map[string]string{"rtprio": "20"}, g.note(rq, "grant limits", pid)
}

func (g *granter) RevokeLimits(rq *api.Request, pid uint32) ([]uint32, error) {
	return []uint32{pid, 7}, g.note(rq, "revoke limits", pid)
}

// realtimeSocket serves the daemon, and so many proxies in front of it, and returns
// the first one's socket.
func realtimeSocket(t *testing.T, g *granter, proxies int) string {
	t.Helper()
	leavesNothing(t)
	sock := serve(t, g, func() {})
	for range proxies {
		sock = serveProxy(t, sock, 0)
	}
	return sock
}

// realtimeOf is a client of it.
func realtimeOf(t *testing.T, g *granter, proxies int) *client.Client {
	t.Helper()
	return dial(t, realtimeSocket(t, g, proxies))
}

// realtimeCalls are all requests of realtime, with what the daemon is asked.
func realtimeCalls(ctx context.Context, c *client.Client) map[string]func() (any, error) {
	only := func(err error) (any, error) { return nil, err }
	own, other := api.Thread{Own: true, ID: 1<<63 + 9}, api.Thread{Process: 1<<64 - 1, ID: 1<<32 + 8}
	return map[string]func() (any, error){
		"[realtime {Process:0 Own:true ID:9223372036854775817} 20]": func() (any, error) {
			return only(c.MakeThreadRealtime(ctx, own, 20))
		},
		"[realtime {Process:18446744073709551615 Own:false ID:4294967304} 4294967295]": func() (any, error) {
			return only(c.MakeThreadRealtime(ctx, other, 1<<32-1))
		},
		"[nice {Process:0 Own:true ID:9223372036854775817} -15]": func() (any, error) {
			return only(c.MakeThreadHighPriority(ctx, own, -15))
		},
		"[nice {Process:18446744073709551615 Own:false ID:4294967304} 19]": func() (any, error) {
			return only(c.MakeThreadHighPriority(ctx, other, 19))
		},
		"[reset known]":        func() (any, error) { return only(c.ResetKnown(ctx)) },
		"[reset all]":          func() (any, error) { return only(c.ResetAll(ctx)) },
		"[exit]":               func() (any, error) { return only(c.ExitRealtime(ctx)) },
		"[properties]":         func() (any, error) { return c.RealtimeProperties(ctx) },
		"[list]":               func() (any, error) { return c.ListGrants(ctx) },
		"[grant 5 fifo 6]":     func() (any, error) { return only(c.Grant(ctx, 5, "fifo", 6)) },
		"[grant 5 other -7]":   func() (any, error) { return only(c.Grant(ctx, 5, "other", -7)) },
		"[revoke 4294967295]":  func() (any, error) { return only(c.Revoke(ctx, 1<<32-1)) },
		"[grant limits 11]":    func() (any, error) { return c.GrantLimits(ctx, 11) },
		"[revoke limits 4096]": func() (any, error) { return c.RevokeLimits(ctx, 4096) },
	}
}

// realtimeResults are what the daemon answers to those that have an answer.
var realtimeResults = map[string]any{
	"[properties]":         bounds,
	"[list]":               granted,
	"[grant limits 11]":    map[string]string{"rtprio": "20"},
	"[revoke limits 4096]": []uint32{4096, 7},
}

// isKit reports whether the request is one of RealtimeKit1.
func isKit(asked string) bool {
	return !slices.ContainsFunc([]string{"[list", "[grant", "[revoke"}, func(s string) bool { return strings.HasPrefix(asked, s) })
}

// Every request of realtime goes down as it is, through one proxy and through
// two, with the credential of whoever asks.
func TestRealtime(t *testing.T) {
	self := api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	for _, proxies := range []int{1, 2} {
		g := &granter{}
		c := realtimeOf(t, g, proxies)
		n := 0
		for asked, call := range realtimeCalls(t.Context(), c) {
			got, err := call()
			if want := realtimeResults[asked]; err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %+v, %v; want %+v", asked, got, err, want)
			}
			g.mu.Lock()
			if n++; len(g.asked) != n || g.asked[n-1] != asked || g.senders[n-1] != self {
				t.Errorf("%s: the daemon was asked %q by %+v", asked, g.asked, g.senders)
			}
			g.mu.Unlock()
		}
		if len(g.hops) != proxies {
			t.Errorf("%d proxies, and it was told of %d hops", proxies, len(g.hops))
		}
	}
}

// What the daemon below refuses the client is refused by the same name, and of
// RealtimeKit1 by the same text.
func TestRealtimeRefused(t *testing.T) {
	for _, k := range api.Kinds() {
		g := &granter{err: api.Errorf(k, "the reason").WithHint("the hint")}
		c := realtimeOf(t, g, 2)
		for asked, call := range realtimeCalls(t.Context(), c) {
			name, text := api.ErrorName(k), "the reason"
			if isKit(asked) {
				name, text = api.RealtimeError(k)
			}
			_, err := call()
			var refusal *client.Error
			if !errors.As(err, &refusal) || refusal.Name != name || refusal.Text != text {
				t.Errorf("%v: %s: %#v", k, asked, err)
			}
		}
	}
}

// The original daemon below knows nothing of it.
func TestRealtimeOriginal(t *testing.T) {
	c := dial(t, start(t, harness.StartOriginal(t, 10).Path, 0))
	for asked, call := range realtimeCalls(t.Context(), c) {
		name, text := api.ErrorName(api.Unsupported), "original"
		if isKit(asked) {
			name, text = api.RealtimeError(api.Unsupported)
		}
		_, err := call()
		var refusal *client.Error
		if !errors.As(err, &refusal) || refusal.Name != name || !strings.Contains(refusal.Text, text) {
			t.Errorf("%s: %#v", asked, err)
		}
	}
}

// The tools that people have find the interface where rtkit has it, with its types.
func TestRealtimeTools(t *testing.T) {
	harness.Require(t, "dbus-send", "gdbus", "busctl")
	addr := "unix:path=" + realtimeSocket(t, &granter{}, 1)
	gdbus := []string{"gdbus", "call", "--address", addr, "--dest", api.RealtimeInterface, "--object-path", api.RealtimePath, "--method"}
	send := []string{"dbus-send", "--peer=" + addr, "--print-reply", api.RealtimePath}
	busctl := []string{"busctl", "--address=" + addr}
	const props = "org.freedesktop.DBus.Properties"
	for _, tool := range []struct {
		argv []string
		more string // the words behind them
		says string
		fail bool
	}{
		{send, api.RealtimeInterface + ".MakeThreadRealtime uint64:0 uint32:20", "method return", false},
		{send, api.RealtimeInterface + ".MakeThreadRealtime uint64:0 uint32:20 string:more", "method return", false},
		{send, api.RealtimeInterface + ".MakeThreadRealtime uint32:0 uint32:20", `InvalidArgs: Argument 0 is specified to be of type "uint64", but is actually of type "uint32"`, true},
		{send, api.RealtimeInterface + ".MakeThreadHighPriority uint64:0", `InvalidArgs: Message has only 1 arguments, but more were expected`, true},
		{send, props + ".Get string:" + api.RealtimeInterface + " string:RTTimeUSecMax", "variant       int64 1099511627777", false},
		{send, props + ".Get string:" + api.RealtimeInterface + " string:MinNiceLevel", "variant       int32 -15", false},
		{send, props + ".Get string:" + api.RealtimeInterface + " string:NoSuch", "UnknownProperty: Unknown property NoSuch", true},
		{send, props + ".Get string:no.such string:MinNiceLevel", "UnknownProperty: Unknown interface no.such", true},
		{send, api.Interface1 + ".ListGrants", "UnknownMethod", true},
		{gdbus, api.RealtimeInterface + ".MakeThreadRealtimeWithPID 1 2 20", "()", false},
		{gdbus, props + ".GetAll " + api.RealtimeInterface, "{'RTTimeUSecMax': <int64 1099511627777>, 'MaxRealtimePriority': <20>, 'MinNiceLevel': <-15>}", false},
		{busctl, "get-property " + api.RealtimeInterface + " " + api.RealtimePath + " " + api.RealtimeInterface + " RTTimeUSecMax", "x 1099511627777", false},
		{busctl, "introspect " + api.RealtimeInterface + " " + api.RealtimePath, ".MakeThreadHighPriorityWithPID", false},
		{busctl, "tree " + api.RealtimeInterface, api.RealtimePath, false},
		{busctl, "call " + api.BusName + " " + api.ObjectPath + " " + api.Interface1 + " ListGrants", `a(uuusixts) 2 1 2 3 "fifo" 4 1099511627776 9223372036854775813 "granted" 6 0 4294967295 "limits" -7 -8 0 "demoted"`, false},
	} {
		argv := slices.Concat(tool.argv, strings.Fields(tool.more))
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
		if (err != nil) != tool.fail || !strings.Contains(string(out), tool.says) {
			t.Errorf("%q: %v, %s; want %q", argv, err, out, tool.says)
		}
	}
}
