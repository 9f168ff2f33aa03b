package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// threadsOf are the threads that a process of the test has started, each of which
// does what it is sent until the channel is closed.
var threadsOf = map[int]chan func(){}

// startThread starts one and returns its number.
var startThread = harness.Inside("start a thread", func(struct{}) (int, error) { return newThread(), nil })

func newThread() int {
	tid, work := make(chan int), make(chan func())
	go func() {
		runtime.LockOSThread() // so that it ends with this function
		tid <- unix.Gettid()
		for f := range work {
			f()
		}
	}()
	n := <-tid
	threadsOf[n] = work
	return n
}

// endThread ends one, and returns when it is gone.
var endThread = harness.Inside("end a thread", func(tid int) (struct{}, error) {
	close(threadsOf[tid])
	delete(threadsOf, tid)
	return struct{}{}, threadEnds(tid)
})

// threadEnds waits until a thread is gone.
func threadEnds(tid int) error {
	if !cgtest.Until(10*time.Second, 100*time.Microsecond, func() bool {
		_, err := os.Lstat(fmt.Sprintf("/proc/self/task/%d", tid))
		return errors.Is(err, os.ErrNotExist)
	}) {
		return fmt.Errorf("thread %d does not end", tid)
	}
	return nil
}

// giveUp has a thread make itself ordinary, which needs no privilege.
var giveUp = harness.Inside("give realtime up", func(tid int) (struct{}, error) {
	err := make(chan error)
	threadsOf[tid] <- func() {
		attr := unix.SchedAttr{Policy: unix.SCHED_NORMAL, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
		err <- unix.SchedSetAttr(0, &attr, 0)
	}
	return struct{}{}, <-err
})

// wanted is a request of rtkit's interface.
type wanted struct {
	Sock            string
	Process, Thread uint64
	Realtime        bool
	Level           int32
}

// scheduled is how the thread is to be scheduled then.
func (q *wanted) scheduled() string {
	if q.Realtime {
		return fmt.Sprintf("rr %d reset", q.Level)
	}
	return fmt.Sprintf("other %d reset", q.Level)
}

// gives: it is more than any thread may have.
func (q *wanted) gives() bool { return q.Realtime || q.Level < 0 }

// asker0 is the connection of the process.
var asker0 *harness.Client

// ask makes a request; an answer that is an error is none of ask's.
func (q *wanted) ask() (answer harness.DBusError, err error) {
	if asker0 == nil {
		if asker0, err = harness.DialClient(q.Sock); err != nil {
			return answer, err
		}
	}
	if q.Realtime {
		_, err = asker0.Call(harness.RT, "MakeThreadRealtimeWithPID", q.Process, q.Thread, uint32(q.Level))
	} else {
		_, err = asker0.Call(harness.RT, "MakeThreadHighPriorityWithPID", q.Process, q.Thread, q.Level)
	}
	if e, ok := errors.AsType[*harness.DBusError](err); ok {
		return harness.DBusError{Name: e.Name, Text: e.Text}, nil
	}
	return answer, err
}

var askRealtime = harness.Inside("ask for realtime", func(q wanted) (harness.DBusError, error) { return q.ask() })

// batch is many requests of a process for threads of its own, some of which end.
type batch struct {
	Seed uint64
	Sock string
	N    int
	// Is is how each thread is scheduled.
	Is map[int]string
	// Granted are the times, on CLOCK_MONOTONIC in nanoseconds, between which each
	// grant was made.
	Granted [][2]int64
}

var askMany = harness.Inside("ask for much", func(b batch) (_ batch, err error) {
	var ended []int
	defer func() { // who looks afterwards is not to see them
		for _, tid := range ended {
			err = errors.Join(err, threadEnds(tid))
		}
	}()
	r := rand.New(rand.NewPCG(b.Seed, 1))
	for n := 0; n < b.N; {
		all := slices.Sorted(maps.Keys(b.Is))
		tid := all[r.IntN(len(all))]
		if work := threadsOf[tid]; work != nil && r.IntN(10) == 0 {
			close(work)
			delete(threadsOf, tid)
			delete(b.Is, tid)
			ended = append(ended, tid)
			b.Is[newThread()] = "other 0"
			continue
		}
		q := wanted{Sock: b.Sock, Process: 1<<32 - 1, Thread: uint64(tid), Realtime: r.IntN(2) == 0, Level: int32(r.IntN(20)) + 1}
		if !q.Realtime {
			q.Level = min(q.Level-16, 0) // a higher one would be inherited
		}
		n++
		start := now()
		a, err := q.ask()
		switch {
		case err != nil:
			return b, err
		case a == rtGranted:
			b.Is[tid] = q.scheduled()
			b.Granted = append(b.Granted, [2]int64{start, now()})
		case a != rtBusy:
			return b, fmt.Errorf("%+v: %w", q, &a)
		}
	}
	return b, nil
})

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// modelProc is a process as the model knows it.
type modelProc struct {
	*harness.Proc
	in *modelBox
	// accounts are whom its requests are charged to.
	accounts []string
	// is is how each of its threads is scheduled that is not the runtime's.
	is      map[uint64]string
	limited bool // it has a RLIMIT_RTTIME
}

// modelBox is a container, with its root and its users.
type modelBox struct {
	*box
	around *modelBox
	procs  []*modelProc // the first is its root
}

// modelThread names a thread.
type modelThread struct {
	p   *modelProc
	tid uint64
}

// model is the ledger as the documentation has it: whom a grant is charged to, and
// the limits of each.
type model struct {
	*testing.T
	rw                          *realtimeWorld
	boxes                       []*modelBox
	threads, processes, actions int
	burst                       time.Duration
	grants                      map[modelThread][]string
	bursts                      map[string]*modelBurst
	answers                     map[harness.DBusError]int
	rand                        *rand.Rand
}

// modelBurst counts the grants of an account since a time between two.
type modelBurst struct {
	from, to time.Time
	n        int
}

// Random requests of fifty uids in ten containers, one after the other: each answer is
// the one that the model gives, and all threads are scheduled as the answers said.
// Then as many at once: no limit is ever exceeded.
func TestKernelRealtimeModel(t *testing.T) {
	m := newModel(t)
	requests := harness.Rounds(10000)
	for n := range requests / 2 {
		m.step()
		if n%250 == 249 {
			m.check()
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	m.check()
	t.Logf("answers: %v", m.answers)
	m.once()
	for range 4 {
		time.Sleep(m.burst)
		m.together((requests/2 + 159) / 160) // 40 processes ask, four times
		if t.Failed() {
			t.FailNow()
		}
	}
}

func newModel(t *testing.T) *model {
	t.Helper()
	m := &model{
		T: t, threads: 10, processes: 5, actions: 15, burst: time.Second,
		grants: map[modelThread][]string{}, bursts: map[string]*modelBurst{}, answers: map[harness.DBusError]int{},
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m.rand = rand.New(rand.NewPCG(seed, 0))
	// A slow machine needs more than the usual RLIMIT_RTTIME for a thread that is realtime
	// and asks for something.
	rw, w := newRealtimeContainers(t, "--log-level=error", "--rttime-usec-max=10000000", "--canary-watchdog-msec=60000", "--canary-cheep-msec=20000",
		fmt.Sprint("--threads-per-user-max=", m.threads), fmt.Sprint("--processes-per-user-max=", m.processes),
		fmt.Sprint("--actions-per-burst-max=", m.actions), "--actions-burst-sec=1")
	m.rw = rw
	for i := range 6 {
		b := w.placed(harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 200000 + 100000*i, MapSize: 60000}), fmt.Sprint("c", i))
		w.fund(b.cg, 30000)
		m.boxes = append(m.boxes, &modelBox{box: b})
	}
	for _, around := range m.boxes[:4] {
		b := around.placedIn(harness.Spec{UserNS: true, PIDNS: true, MapFrom: 10000, MapSize: 20000}, "in")
		w.fund(b.cg, 10000)
		m.boxes = append(m.boxes, &modelBox{box: b, around: around})
	}
	for _, b := range m.boxes {
		// One is started before its root has the limit, which is inherited.
		without := b.user(1000)
		m.add(b, b.Proc, true)
		m.add(b, without, false)
		for uid := range uint32(3) {
			m.add(b, b.user(1001+uid), true)
		}
	}
	return m
}

// add makes a process of a container's known, with three threads. One without a
// RLIMIT_RTTIME gets no realtime.
func (m *model) add(b *modelBox, q *harness.Proc, limited bool) *modelProc {
	m.Helper()
	p := &modelProc{Proc: q, in: b, limited: limited, is: map[uint64]string{uint64(q.PID): "other 0"}}
	if limited {
		m.rw.limit(q, m.rw.rttime)
	}
	// A uid in a container is another than the one that made it, whatever its number.
	p.accounts = []string{fmt.Sprint("uid in a container ", q.HostUID)}
	for c := b; c != nil; c = c.around {
		p.accounts = append(p.accounts, "container "+c.cg)
		if c.around != nil && c.around.HostUID != q.HostUID { // who made it
			p.accounts = append(p.accounts, fmt.Sprint("uid ", c.around.HostUID))
		}
	}
	for range 3 {
		m.start(p)
	}
	b.procs = append(b.procs, p)
	return p
}

func (m *model) start(p *modelProc) {
	m.Helper()
	m.run(p, startThread, struct{}{}, func(tid uint64) { p.is[tid] = "other 0" })
}

func (m *model) run(p *modelProc, name string, args any, done func(tid uint64)) {
	m.Helper()
	var tid uint64
	result := any(&tid)
	if done == nil {
		result = nil
	}
	if err := p.Run(name, args, result); err != nil {
		m.Fatalf("%s %v in process %d: %v", name, args, p.HostPID, err)
	}
	if done != nil {
		done(tid)
	}
}

func (m *model) end(p *modelProc, tid uint64) {
	m.Helper()
	m.run(p, endThread, tid, nil)
	delete(p.is, tid)
	delete(m.grants, modelThread{p, tid})
}

// thread picks one of p's that it has started itself, or with first the first one too.
func (m *model) thread(p *modelProc, first bool) uint64 {
	for {
		all := slices.Sorted(maps.Keys(p.is))
		if tid := all[m.rand.IntN(len(all))]; first || tid != uint64(p.PID) {
			return tid
		}
	}
}

// step lets something live or die, and makes a request.
func (m *model) step() {
	m.Helper()
	b := m.boxes[m.rand.IntN(len(m.boxes))]
	i := m.rand.IntN(len(b.procs))
	p := b.procs[i]
	switch n := m.rand.IntN(100); {
	case n < 8:
		m.end(p, m.thread(p, false))
		m.start(p)
	case n < 20:
		if tid := m.thread(p, false); m.grants[modelThread{p, tid}] != nil {
			m.run(p, giveUp, tid, nil)
			p.is[tid] = "other 0 reset"
			delete(m.grants, modelThread{p, tid})
		}
	case n < 21 && i > 0: // its root is needed
		p.Stop()
		maps.DeleteFunc(m.grants, func(t modelThread, _ []string) bool { return t.p == p })
		b.procs = slices.Delete(b.procs, i, i+1)
		p = m.add(b, b.user(p.UID), true)
	}
	q := wanted{Sock: m.rw.sock, Process: 1<<32 - 1, Realtime: m.rand.IntN(3) > 0, Level: int32(m.rand.IntN(20)) + 1}
	target := p
	tid := m.thread(p, true)
	q.Thread = tid
	if !q.Realtime {
		q.Level = min(q.Level-16, 0) // a higher one would be inherited
	}
	switch n := m.rand.IntN(100); {
	case n < 8:
		q.Realtime, q.Level = true, []int32{0, 21, 99, 100}[m.rand.IntN(4)]
	case n < 14:
		q.Realtime, q.Level = false, []int32{-21, -20, -16, 20}[m.rand.IntN(4)]
	case n < 20:
		q.Thread, tid = 30000, 0
	case n < 25:
		q.Process, target = 30000, nil
	case n < 45: // another's process, which only root may help
		target = b.procs[m.rand.IntN(len(b.procs))]
		tid = m.thread(target, true)
		q.Process, q.Thread = uint64(target.PID), tid
		if m.rand.IntN(2) == 0 {
			p = b.procs[0]
		}
	}
	if target != nil && tid == uint64(target.PID) && m.rand.IntN(2) == 0 {
		q.Thread = 0
	}
	m.request(p, target, tid, &q)
}

// request has p make a request for a thread of target's (nil: there is none such), and
// compares the answer with the model's.
func (m *model) request(p, target *modelProc, tid uint64, q *wanted) {
	m.Helper()
	// Not where a burst is about to end, which the daemon may see otherwise. While one
	// is waited for another may come near its end.
	for again := true; again; {
		again = false
		for _, name := range p.accounts {
			b := m.bursts[name]
			if b == nil || time.Until(b.from.Add(m.burst-30*time.Millisecond)) > 0 {
				continue
			}
			if until := time.Until(b.to.Add(m.burst + time.Millisecond)); until > 0 {
				time.Sleep(until)
				again = true
			}
		}
	}
	start := time.Now()
	want, counts := m.expected(p, target, tid, q, start)
	var got harness.DBusError
	if err := p.Run(askRealtime, q, &got); err != nil {
		m.Fatalf("%+v by process %d: %v", q, p.HostPID, err)
	}
	end := time.Now()
	late := false
	for _, name := range p.accounts {
		b := m.bursts[name]
		late = late || b != nil && start.Before(b.to.Add(m.burst)) && !end.Before(b.from.Add(m.burst))
	}
	switch {
	case late:
		// One that took so long, or was so long in coming, may have been counted in
		// either. All are done with then.
		m.Logf("a request took %v", end.Sub(start))
		time.Sleep(m.burst + time.Millisecond)
		for _, name := range p.accounts {
			delete(m.bursts, name)
		}
		counts = false
		if got != want && got != rtBusy && want != rtBusy {
			m.Errorf("%+v by process %d of %v: %q, want %q", *q, p.HostPID, p.accounts, &got, &want)
		}
	case got != want:
		m.Errorf("%+v by process %d of %v: %q, want %q", *q, p.HostPID, p.accounts, &got, &want)
	}
	m.answers[got]++
	if counts {
		for _, name := range p.accounts {
			b := m.bursts[name]
			if b == nil || !start.Before(b.to.Add(m.burst)) {
				b = &modelBurst{from: start, to: end}
				m.bursts[name] = b
			}
			b.n++
		}
	}
	if got == rtGranted {
		target.is[tid] = q.scheduled()
		delete(m.grants, modelThread{target, tid})
		if q.gives() {
			m.grants[modelThread{target, tid}] = p.accounts
		}
	}
}

// expected is the answer to a request, in the order of rtkit's checks, and whether it
// counts in the burst.
func (m *model) expected(p, target *modelProc, tid uint64, q *wanted, at time.Time) (answer harness.DBusError, counts bool) {
	if target == nil {
		return rtNotFound, false
	}
	for _, name := range p.accounts {
		if has, processes := m.has(name); len(processes) >= m.processes && !processes[target] && len(has) > 0 {
			return rtBusy, false
		}
	}
	if tid == 0 {
		return rtNotFound, false
	}
	for _, name := range p.accounts {
		if has, _ := m.has(name); len(has) >= m.threads && !has[modelThread{target, tid}] {
			return rtBusy, false
		}
	}
	switch l := q.Level; {
	case q.Realtime && (l < 1 || l > 99), !q.Realtime && (l < -20 || l > 19):
		return rtInvalid, false
	case q.Realtime && l > 20, !q.Realtime && l < -15:
		return rtDenied, false
	}
	for _, name := range p.accounts {
		if b := m.bursts[name]; b != nil && at.Before(b.from.Add(m.burst)) && b.n >= m.actions {
			return rtBusy, false
		}
	}
	switch {
	case p != target && p != p.in.procs[0], q.Realtime && !target.limited:
		return rtDenied, true
	}
	return rtGranted, true
}

// has is what an account has.
func (m *model) has(account string) (threads map[modelThread]bool, processes map[*modelProc]bool) {
	threads, processes = map[modelThread]bool{}, map[*modelProc]bool{}
	for t, charged := range m.grants {
		if slices.Contains(charged, account) {
			threads[t], processes[t.p] = true, true
		}
	}
	return threads, processes
}

// check compares what the kernel shows of every thread, and what the daemon lists,
// with the model.
func (m *model) check() {
	m.Helper()
	granted := map[uint64]bool{}
	for _, b := range m.boxes {
		for _, p := range b.procs {
			seen := 0
			for _, n := range p.Threads() {
				tid := uint64(n[len(n)-1])
				is, known := p.is[tid]
				if !known {
					is = "other 0" // of the runtime's
				} else {
					seen++
				}
				if got, err := scheduled(int(n[0])); err != nil || got != is {
					m.Errorf("thread %d of process %d in %s is %q (%v), want %q", tid, p.PID, b.cg, got, err, is)
				}
				if _, ok := m.grants[modelThread{p, tid}]; ok {
					granted[uint64(n[0])] = true
				}
			}
			if seen != len(p.is) {
				m.Errorf("process %d has %d of its %d threads", p.HostPID, seen, len(p.is))
			}
		}
	}
	listed := map[uint64]bool{}
	c := m.rw.p.MustDial(m.rw.sock)
	defer c.Close()
	values, err := c.V1("ListGrants")
	if err != nil {
		m.Fatal(err)
	}
	rows, _ := values[0].([][]any)
	for _, row := range rows {
		tid, _ := row[1].(uint32)
		listed[uint64(tid)] = true
	}
	if !maps.Equal(listed, granted) {
		m.Errorf("granted are %v, listed %v", slices.Sorted(maps.Keys(granted)), slices.Sorted(maps.Keys(listed)))
	}
}

// once has everything taken back.
func (m *model) once() {
	m.Helper()
	c := m.rw.p.MustDial(m.rw.sock)
	defer c.Close()
	if _, err := c.RT("ResetKnown"); err != nil {
		m.Fatal(err)
	}
	for t := range m.grants {
		t.p.is[t.tid] = "other 0"
	}
	clear(m.grants)
	m.check()
}

// together has all processes ask at once, each n times for threads of its own.
func (m *model) together(n int) {
	m.Helper()
	type result struct {
		p   *modelProc
		b   batch
		err error
	}
	var wg sync.WaitGroup
	results := make(chan result, 50)
	for _, b := range m.boxes {
		for _, p := range b.procs {
			if !p.limited {
				continue // every answer would be another
			}
			job := batch{Seed: m.rand.Uint64(), Sock: m.rw.sock, N: max(n, 2), Is: map[int]string{}}
			for tid, is := range p.is {
				job.Is[int(tid)] = is
			}
			wg.Go(func() {
				r := result{p: p}
				r.err = p.Run(askMany, job, &r.b)
				results <- r
			})
		}
	}
	wg.Wait()
	close(results)
	granted := map[string][][2]int64{}
	for r := range results {
		if r.err != nil {
			m.Fatal(r.err)
		}
		for t := range m.grants {
			if t.p == r.p {
				delete(m.grants, t)
			}
		}
		clear(r.p.is)
		for tid, is := range r.b.Is {
			r.p.is[uint64(tid)] = is
			var level int
			if _, err := fmt.Sscanf(is, "other %d", &level); err != nil || level < 0 {
				m.grants[modelThread{r.p, uint64(tid)}] = r.p.accounts
			}
		}
		for _, name := range r.p.accounts {
			granted[name] = append(granted[name], r.b.Granted...)
		}
	}
	m.check()
	total := 0
	for name, times := range granted {
		threads, processes := m.has(name)
		if len(threads) > m.threads || len(processes) > m.processes {
			m.Errorf("%s has %d threads of %d processes, no more than %d of %d may", name, len(threads), len(processes), m.threads, m.processes)
		}
		total += len(times)
		// A time as long as a burst touches two at most.
		for _, from := range times {
			n := 0
			for _, g := range times {
				if g[0] >= from[0] && g[1] <= from[0]+int64(m.burst) {
					n++
				}
			}
			if n > 2*m.actions {
				m.Errorf("%s was granted %d within %v", name, n, m.burst)
				break
			}
		}
	}
	if total == 0 {
		m.Error("nobody was granted anything")
	}
}
