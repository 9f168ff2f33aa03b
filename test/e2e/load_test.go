package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// loadArgs are for load: so many clients in one process, each with a cgroup of
// its own, called by Name and its number, that is there already.
type loadArgs struct {
	Sock, Name string
	Clients    int
	// Until is a file that ends it as soon as it is there.
	Until string
	// Killed: the daemon is killed now and then. What was asked and not answered
	// may have been carried out, in part as well: it is asked again.
	Killed bool
}

// loadClient is what a client did, and what there must be in the end.
type loadClient struct {
	Root       string
	Answered   int
	Reconnects int
	// Again counts the requests that were sent and never answered.
	Again int
	Worst time.Duration
	Wrong []string
	// Limits are pids.limit of the cgroups that there are below Root; Task is
	// where the client's task is, PID its number.
	Limits map[string]int
	Task   string
	PID    int
}

var load = harness.Inside("load", func(a loadArgs) ([]loadClient, error) {
	all := make([]loadClient, a.Clients)
	var tasks []*exec.Cmd
	for i := range all {
		task := exec.Command("/bin/sleep", "600")
		task.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := task.Start(); err != nil {
			return nil, err
		}
		tasks = append(tasks, task)
		all[i] = loadClient{Root: a.Name + strconv.Itoa(i), Limits: map[string]int{}, PID: task.Process.Pid}
	}
	go func() { // they end with the process, or when the test ends them
		for _, t := range tasks {
			_ = t.Wait()
		}
	}()
	var clients sync.WaitGroup
	for i := range all {
		clients.Go(func() { (&loader{loadArgs: a, loadClient: &all[i]}).run() })
	}
	clients.Wait()
	return all, nil
})

// loader is a client at work.
type loader struct {
	loadArgs
	*loadClient
	conn *harness.Client
}

func (l *loader) run() {
	// In no case longer than the test waits.
	for end := time.Now().Add(4 * time.Minute); time.Now().Before(end) && len(l.Wrong) < 5; {
		if _, err := os.Lstat(l.Until); err == nil {
			break
		}
		l.step()
	}
	if l.conn != nil {
		l.conn.Close()
	}
}

func (l *loader) wrong(format string, args ...any) {
	l.Wrong = append(l.Wrong, fmt.Sprintf(format, args...))
}

// ask makes a request until it is answered.
func (l *loader) ask(iface, member string, args ...any) (body []any, err error) {
	start := time.Now()
	for time.Since(start) < cgtest.Patience(20*time.Second) {
		if l.conn == nil {
			if l.conn, err = harness.DialClient(l.Sock); err != nil {
				l.conn = nil
				if !l.Killed && !errors.Is(err, harness.ErrNotSent) && !errors.Is(err, unix.EAGAIN) {
					l.wrong("connect: %v", err)
					return nil, err
				}
				time.Sleep(time.Millisecond)
				continue
			}
			l.Reconnects++
		}
		body, err = l.conn.Call(iface, member, args...)
		de := (*harness.DBusError)(nil)
		if err == nil || errors.As(err, &de) {
			l.Answered++
			l.Worst = max(l.Worst, time.Since(start))
			return body, err
		}
		if !errors.Is(err, harness.ErrNotSent) {
			l.Again++
			if !l.Killed {
				l.wrong("%s %v was sent and not answered: %v", member, args, err)
			}
		}
		l.conn.Close()
		l.conn = nil
	}
	l.wrong("%s %v: no answer in %v: %v", member, args, time.Since(start), err)
	return nil, err
}

// must is ask for what cannot fail.
func (l *loader) must(iface, member string, args ...any) []any {
	again := l.Again
	body, err := l.ask(iface, member, args...)
	// What was carried out before the daemon was killed is there, or gone.
	done := l.Again > again && err != nil && member == "Delete" && strings.Contains(err.Error(), "FileNotFound")
	if err != nil && !done {
		l.wrong("%s %v: %v", member, args, err)
	}
	return body
}

func (l *loader) equal(what string, got, want any) {
	if fmt.Sprint(got) != fmt.Sprint(want) {
		l.wrong("%s: got %v, want %v", what, got, want)
	}
}

// step makes one of the requests that there are.
func (l *loader) step() {
	names := slices.Sorted(maps.Keys(l.Limits))
	limit := 10 + rand.IntN(1000)
	name := l.Root + "/c" + strconv.Itoa(rand.IntN(8))
	_, there := l.Limits[name]
	switch n := rand.IntN(10); {
	case !there:
		again := l.Again
		got := l.must(harness.V1, "Create", name, []string{"pids"}, map[string]string{"pids.limit": strconv.Itoa(limit)})
		if l.Again == again && len(got) == 1 {
			l.equal("whether Create made "+name, got[0], true)
		}
		l.Limits[name] = limit
	case n == 0:
		l.must(harness.V1, "ListControllers")
	case n == 1:
		l.must(harness.V1, "SetValue", name, map[string]string{"pids.limit": strconv.Itoa(limit)})
		l.Limits[name] = limit
	case n == 2:
		l.must(harness.V0, "SetValue", "pids", name, "pids.max", strconv.Itoa(limit))
		l.Limits[name] = limit
	case n == 3:
		if got := l.must(harness.V1, "GetValue", name, []string{"pids.limit"}); len(got) == 1 {
			l.equal("the limit of "+name, got[0], map[string]string{"pids.limit": strconv.Itoa(l.Limits[name])})
		}
	case n == 4:
		if got := l.must(harness.V0, "GetValue", "pids", name, "pids.max"); len(got) == 1 {
			l.equal("pids.max of "+name, got[0], l.Limits[name])
		}
	case n == 5:
		if got := l.must(harness.V0, "ListChildren", "pids", l.Root); len(got) == 1 {
			children, _ := got[0].([]string)
			slices.Sort(children)
			for i := range names {
				names[i] = filepath.Base(names[i])
			}
			l.equal("the children", children, names)
		}
	case n == 6:
		l.must(harness.V0, "MovePid", "pids", name, int32(l.PID))
		l.Task = name
	case n == 7:
		if got := l.must(harness.V0, "GetTasks", "pids", name); len(got) == 1 {
			want := []int32{}
			if l.Task == name {
				want = append(want, int32(l.PID))
			}
			l.equal("the tasks of "+name, got[0], want)
		}
	case n == 8 && l.Task != "":
		if got := l.must(harness.V0, "GetPidCgroup", "pids", int32(l.PID)); len(got) == 1 {
			l.equal("where the task is", got[0], l.Task)
		}
	case n == 9 && l.Task != name:
		l.must(harness.V1, "Delete", name)
		delete(l.Limits, name)
	default:
		l.must(harness.V0, "Ping", int32(0))
	}
}

// 64 clients, and a daemon that is replaced, or killed and started again, time
// after time: no request is lost or answered wrongly, and what there is in the
// end is what was answered.
func TestKernelUnderLoad(t *testing.T) {
	t.Run("replaced", func(t *testing.T) { underLoad(t, false) })
	t.Run("killed", func(t *testing.T) { underLoad(t, true) })
}

func underLoad(t *testing.T, killed bool) {
	restarts, span, processes, each := 10, 30*time.Second, 8, 8
	if testing.Short() {
		span = 5 * time.Second
	}
	if harness.Emulated() {
		restarts, span = 4, 10*time.Second
	}
	r := newReplacement(t)
	tree := harness.NewTree(t)
	w := &world{T: t, Tree: tree}
	pids := harness.Find(t, "pids")
	tree.Make("load", 0, 0)
	var puppets []*harness.Proc
	for i := range processes {
		p := w.host(0, "load")
		puppets = append(puppets, p)
		for c := range each {
			tree.Make(fmt.Sprintf("load/p%d-%d", i, c), 0, 0)
		}
	}
	d := r.start()
	r.served(d)

	enough := filepath.Join(r.dir, "enough")
	results := make(chan []loadClient, processes)
	for i, p := range puppets {
		go func() {
			var got []loadClient
			if err := p.Run(load, loadArgs{r.sock, fmt.Sprintf("p%d-", i), each, enough, killed}, &got); err != nil {
				t.Errorf("process %d: %v", i, err)
			}
			results <- got
		}()
	}
	var gaps []time.Duration
	for range restarts {
		time.Sleep(span / time.Duration(restarts+2))
		start := time.Now()
		if killed {
			d.kill9()
			d = r.start()
		} else {
			next := r.start("--replace")
			if code := d.wait(10 * time.Second); code != 0 {
				t.Errorf("the daemon that was replaced ended with %d", code)
			}
			d = next
		}
		r.served(d)
		gaps = append(gaps, time.Since(start).Round(time.Millisecond))
	}

	time.Sleep(span / time.Duration(restarts+2))
	if err := os.WriteFile(enough, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var sum loadClient
	reconnects := 0
	for range processes {
		for _, c := range <-results {
			for _, wrong := range c.Wrong {
				t.Errorf("client %s: %s", c.Root, wrong)
			}
			if c.Reconnects > restarts+1 {
				t.Errorf("client %s connected %d times", c.Root, c.Reconnects)
			}
			sum.Answered += c.Answered
			sum.Again += c.Again
			sum.Worst = max(sum.Worst, c.Worst)
			reconnects += c.Reconnects - 1
			checkModel(t, w, pids, c)
		}
	}
	if reconnects == 0 || sum.Answered < 1000 && !harness.Emulated() {
		t.Errorf("%d requests and %d reconnects are no load", sum.Answered, reconnects)
	}
	t.Logf("%d requests answered, %d asked again, %d reconnects; the worst took %v; restarts took %v", sum.Answered, sum.Again, reconnects, sum.Worst.Round(time.Millisecond), gaps)
	d.terminate()
}

// checkModel compares what is there with what was answered.
func checkModel(t *testing.T, w *world, pids harness.Hierarchy, c loadClient) {
	t.Helper()
	there := map[string]int{}
	root := w.Dir(pids, "load/"+c.Root)
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	task := ""
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		name := c.Root + "/" + e.Name()
		b, err := os.ReadFile(filepath.Join(root, e.Name(), "pids.max"))
		if err != nil {
			t.Fatal(err)
		}
		there[name], _ = strconv.Atoi(strings.TrimSpace(string(b)))
		b, err = os.ReadFile(filepath.Join(root, e.Name(), "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(strings.Fields(string(b)), strconv.Itoa(c.PID)) {
			task = name
		}
	}
	if !maps.Equal(there, c.Limits) || task != c.Task {
		t.Errorf("client %s: there is %v and the task in %q, answered was %v and %q", c.Root, there, task, c.Limits, c.Task)
	}
}
