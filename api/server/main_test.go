package server

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// TestMain serves a fakeBackend at $CGM_TEST_SERVE until SIGTERM, where that
// is set: for measurements with a client of its own.
func TestMain(m *testing.M) {
	// The runtime opens its poller at the first use: before anybody counts.
	if r, _, err := os.Pipe(); err == nil {
		_ = r.Close()
	}
	path := os.Getenv("CGM_TEST_SERVE")
	if path == "" {
		os.Exit(m.Run())
	}
	runtime.GOMAXPROCS(1)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	l, err := Listen(path)
	if err == nil {
		var s *Server
		if s, err = New(Config{Backend: &fakeBackend{}, Listeners: []*Listener{l}, Version: "test"}); err == nil {
			err = s.Serve(ctx)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// fakeBackend answers with what it was asked, so that tests see what the
// transport made of a request. It touches no cgroup.
type fakeBackend struct {
	api.Backend
	accounts func(api.Cred) []string
	open     func(api.Cred) error
	block    chan struct{}             // if set, Create0 of "block" waits for it
	actFor   string                    // how ActFor ends, as the cgroup's name elsewhere
	refused  atomic.Pointer[api.Error] // of RealtimeRefused
	// realtimeEnds is how requests of RealtimeKit1 end, as the cgroup's name
	// elsewhere.
	realtimeEnds atomic.Pointer[string]
	asked        atomic.Pointer[string] // the last one of those, in words
	peers        atomic.Int64           // that are open
	pids         []int32
	request      atomic.Pointer[api.Request] // the last one
}

type fakePeer struct {
	b    *fakeBackend
	cred api.Cred
}

func (p *fakePeer) AcceptsIdentity(uid uint32) bool { return uid == p.cred.UID }
func (p *fakePeer) Close()                          { p.b.peers.Add(-1) }
func (p *fakePeer) Accounts() []string {
	if p.b.accounts == nil {
		return nil
	}
	return p.b.accounts(p.cred)
}

func (b *fakeBackend) Open(opener api.Cred, pidfd int) (api.Peer, error) {
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if b.open != nil {
		if err := b.open(opener); err != nil {
			return nil, err
		}
	}
	b.peers.Add(1)
	return &fakePeer{b, opener}, nil
}

// fail fails where the cgroup's name asks for it.
func (b *fakeBackend) fail(rq *api.Request, name string) error {
	b.request.Store(rq)
	switch kind, ok := strings.CutPrefix(name, "fail "); {
	case ok:
		for _, k := range api.Kinds() {
			if k.String() == kind {
				return api.Errorf(k, "create %q: %s", name, k)
			}
		}
	case name == "panic":
		panic("asked to")
	case name == "error":
		return fmt.Errorf("a secret of the host")
	case name == "block" && b.block != nil:
		<-b.block
	case name == "slow":
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

func victimText(v api.Victim) string {
	if v.Cred != nil {
		return fmt.Sprintf("cred %d", v.Cred.PID)
	}
	return strconv.FormatInt(v.PID, 10)
}

func (b *fakeBackend) GetPidCgroup0(rq *api.Request, controller string, v api.Victim) (string, error) {
	return "pid " + victimText(v), b.fail(rq, controller)
}

func (b *fakeBackend) GetPidCgroupAbs0(rq *api.Request, controller string, v api.Victim) (string, error) {
	return "/pid " + victimText(v), b.fail(rq, controller)
}

func (b *fakeBackend) MovePid0(rq *api.Request, _, cgroup string, _ api.Victim) error {
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) MovePidAbs0(rq *api.Request, _, cgroup string, _ api.Victim) error {
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) Create0(rq *api.Request, _, cgroup string) (api.Existed, error) {
	if cgroup == "there" {
		return api.DidExist, b.fail(rq, cgroup)
	}
	return api.DidNotExist, b.fail(rq, cgroup)
}

func (b *fakeBackend) Chown0(rq *api.Request, _, cgroup string, o api.Owner) error {
	if cgroup == "owner" {
		return api.Errorf(api.Denied, "owner %d %d %v", o.UID, o.GID, o.Host)
	}
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) Chmod0(rq *api.Request, _, cgroup, _ string, _ int32) error {
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) GetValue0(rq *api.Request, controller, cgroup, key string) (string, error) {
	switch key {
	case "long":
		return strings.Repeat("x", wire.MaxReply), nil
	case "binary":
		return "\xff", nil
	}
	return strings.Join([]string{controller, cgroup, key}, " "), b.fail(rq, cgroup)
}

func (b *fakeBackend) SetValue0(rq *api.Request, _, cgroup, _, _ string) error {
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) Remove0(rq *api.Request, _, cgroup string, _ bool) (api.Existed, error) {
	if cgroup == "there" {
		return api.DidExist, nil
	}
	return api.DidNotExist, b.fail(rq, cgroup)
}

func (b *fakeBackend) GetTasks0(rq *api.Request, _, cgroup string) ([]int32, error) {
	return b.pids, b.fail(rq, cgroup)
}

func (b *fakeBackend) GetTasksRecursive0(rq *api.Request, _, cgroup string) ([]int32, error) {
	return b.pids, b.fail(rq, cgroup)
}

func (b *fakeBackend) ListChildren0(rq *api.Request, _, cgroup string) ([]string, error) {
	if cgroup == "empty" {
		return nil, nil
	}
	return []string{"k1", "k2"}, b.fail(rq, cgroup)
}

func (b *fakeBackend) RemoveOnEmpty0(rq *api.Request, _, cgroup string) error {
	return b.fail(rq, cgroup)
}

func (b *fakeBackend) Prune0(rq *api.Request, _, cgroup string) error { return b.fail(rq, cgroup) }

func (b *fakeBackend) ListControllers0(rq *api.Request) ([]string, error) {
	return []string{"memory", "freezer"}, b.fail(rq, "")
}

func (b *fakeBackend) ListKeys0(rq *api.Request, _, cgroup string) ([]api.Key, error) {
	return []api.Key{{Name: "tasks", Mode: 33188}, {Name: "x", UID: 1000, GID: api.NoID, Mode: 33060}}, b.fail(rq, cgroup)
}

func (b *fakeBackend) ListControllers(rq *api.Request, name *string) ([]string, error) {
	if name == nil {
		return []string{"memory"}, nil
	}
	return []string{"memory", *name}, b.fail(rq, *name)
}

func (b *fakeBackend) Create(rq *api.Request, name string, controllers []string, values map[string]string) (bool, error) {
	return len(controllers) == len(values), b.fail(rq, name)
}

func (b *fakeBackend) SetValue(rq *api.Request, name string, _ map[string]string) error {
	return b.fail(rq, name)
}

func (b *fakeBackend) GetValue(rq *api.Request, name string, keys []string) (map[string]string, error) {
	values := map[string]string{}
	for _, k := range keys {
		values[k] = name
	}
	return values, b.fail(rq, name)
}

func (b *fakeBackend) ListChildren(rq *api.Request, name string) ([]string, error) {
	return []string{name}, b.fail(rq, name)
}

func (b *fakeBackend) ListTasks(rq *api.Request, name string) ([]uint32, uint32, error) {
	return []uint32{1, 2, 3}, 4, b.fail(rq, name)
}

func (b *fakeBackend) Chown(rq *api.Request, name string, _, _ uint32) error {
	return b.fail(rq, name)
}
func (b *fakeBackend) Move(rq *api.Request, name string, _ uint32) error { return b.fail(rq, name) }
func (b *fakeBackend) MoveFd(rq *api.Request, name string, _ int) error  { return b.fail(rq, name) }
func (b *fakeBackend) Delete(rq *api.Request, name string) error         { return b.fail(rq, name) }
func (b *fakeBackend) DeleteForce(rq *api.Request, name string) error    { return b.fail(rq, name) }
func (b *fakeBackend) Kill(rq *api.Request, name string) error           { return b.fail(rq, name) }

func (b *fakeBackend) ActFor(rq *api.Request) error { return b.fail(rq, b.actFor) }

func (b *fakeBackend) ListGrants(rq *api.Request) ([]api.Grant, error) {
	return []api.Grant{
		{PID: 10, TID: 11, UID: 1000, Policy: "rr", Level: 20, Since: 1 << 40, CPU: 1<<63 + 1, State: "granted"},
		{PID: 12, TID: 12, UID: api.NoID, Policy: "other", Level: -15, Since: -1, State: "demoted"},
	}, b.fail(rq, "")
}

func (b *fakeBackend) Grant(rq *api.Request, _ uint32, policy string, _ int32) error {
	return b.fail(rq, policy)
}

func (b *fakeBackend) Revoke(rq *api.Request, _ uint32) error { return b.fail(rq, "") }

func (b *fakeBackend) GrantLimits(rq *api.Request, pid uint32) (map[string]string, error) {
	return map[string]string{"rtprio": strconv.Itoa(int(pid))}, b.fail(rq, "")
}

func (b *fakeBackend) RevokeLimits(rq *api.Request, pid uint32) ([]uint32, error) {
	return []uint32{pid, 7}, b.fail(rq, "")
}

// RealtimeRefused refuses with b.refused.
func (b *fakeBackend) RealtimeRefused(*api.Request) error {
	if e := b.refused.Load(); e != nil {
		return e
	}
	return nil
}

// realtimeFail fails as b.realtimeEnds says.
func (b *fakeBackend) realtimeFail(rq *api.Request) error {
	ends := ""
	if e := b.realtimeEnds.Load(); e != nil {
		ends = *e
	}
	return b.fail(rq, ends)
}

func (b *fakeBackend) realtime(rq *api.Request, format string, args ...any) error {
	asked := fmt.Sprintf(format, args...)
	b.asked.Store(&asked)
	return b.realtimeFail(rq)
}

func (b *fakeBackend) MakeThreadRealtime(rq *api.Request, t api.Thread, priority uint32) error {
	return b.realtime(rq, "realtime %+v %d", t, priority)
}

func (b *fakeBackend) MakeThreadHighPriority(rq *api.Request, t api.Thread, nice int32) error {
	return b.realtime(rq, "nice %+v %d", t, nice)
}

func (b *fakeBackend) ResetKnown(rq *api.Request) error { return b.realtime(rq, "reset known") }
func (b *fakeBackend) ResetAll(rq *api.Request) error   { return b.realtime(rq, "reset all") }
func (b *fakeBackend) Exit(rq *api.Request) error       { return b.realtime(rq, "exit") }

func (b *fakeBackend) RealtimeProperties(rq *api.Request) (api.RealtimeProperties, error) {
	return api.RealtimeProperties{RTTimeUSecMax: 1<<32 + 200000, MaxRealtimePriority: 20, MinNiceLevel: -15}, b.realtimeFail(rq)
}

func (b *fakeBackend) Delegate(rq *api.Request, name string, controllers []string) (string, error) {
	return "/" + name + "/" + strings.Join(controllers, ","), b.fail(rq, name)
}
