package server

import "sync"

// The pools of goroutines, by their index in account.pools.
const (
	workers = iota
	askers
	closers
	pools // how many there are
)

// idleGoroutines is how many goroutines a pool keeps parked.
const idleGoroutines = 4

// task is work that may wait: for the kernel's locks or for a stranger's file
// system. It is started at most once.
type task interface {
	// run works without the server's mutex; buf is a buffer to use, and what
	// it returns is the buffer to use next. It must not panic.
	run(buf []byte) []byte
}

// pool runs tasks in a bounded number of goroutines, of which the tasks of one
// account occupy a bounded number too. All its fields are guarded by mu.
type pool struct {
	mu         *sync.Mutex
	index      int // in account.pools
	max        int
	perAccount int

	ready       queue // tasks that wait for a goroutine and for nothing else
	idle, total int
	waking      bool // a goroutine was signalled and has not looked yet
	wake        *sync.Cond
	stopped     bool
}

// queued is a task with whom to charge for it.
type queued struct {
	task     task
	accounts []*account
	next     *queued
}

// queue is first in, first out.
type queue struct{ head, tail *queued }

func (q *queue) push(e *queued) {
	if q.tail == nil {
		q.head = e
	} else {
		q.tail.next = e
	}
	q.tail = e
}

func (q *queue) pop() *queued {
	e := q.head
	if q.head = e.next; q.head == nil {
		q.tail = nil
	}
	e.next = nil
	return e
}

// poolAccount is what an account uses of a pool.
type poolAccount struct {
	running int   // tasks in ready or in a goroutine
	waiting queue // tasks that wait because running is at its bound
}

func (a *poolAccount) idle() bool { return a.running == 0 && a.waiting.head == nil }

func newPool(mu *sync.Mutex, index, limit, perAccount int) *pool {
	return &pool{mu: mu, index: index, max: limit, perAccount: perAccount, wake: sync.NewCond(mu)}
}

// submit queues t. Called with mu held.
func (p *pool) submit(t task, accounts []*account) {
	p.admit(&queued{task: t, accounts: accounts})
}

// admit moves e to ready, or to the queue of the first account that is at its
// bound. Called with mu held.
func (p *pool) admit(e *queued) {
	for _, a := range e.accounts {
		if pa := &a.pools[p.index]; pa.running >= p.perAccount {
			pa.waiting.push(e)
			return
		}
	}
	for _, a := range e.accounts {
		a.pools[p.index].running++
	}
	p.ready.push(e)
	p.signal()
}

// signal wakes one goroutine for what is ready. One is enough: it signals the
// next before it starts, which runs only if there is a processor to spare
// because this one waits in the kernel. Called with mu held.
func (p *pool) signal() {
	switch {
	case p.waking || p.ready.head == nil:
	case p.idle > 0:
		p.waking = true
		p.wake.Signal()
	case p.total < p.max:
		p.waking = true
		p.total++
		go p.loop()
	}
}

func (p *pool) loop() {
	var buf []byte
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		p.waking = false
		for p.ready.head != nil {
			e := p.ready.pop()
			p.signal()
			p.mu.Unlock()
			buf = e.task.run(buf)
			p.mu.Lock()
			p.release(e)
		}
		if p.stopped || p.idle >= idleGoroutines {
			p.total--
			return
		}
		if cap(buf) > 16<<10 {
			buf = nil
		}
		p.idle++
		p.wake.Wait()
		p.idle--
	}
}

// stop lets the goroutines end once nothing is ready. Called with mu held.
func (p *pool) stop() {
	p.stopped = true
	p.wake.Broadcast()
}

// release gives e's places back. Called with mu held.
func (p *pool) release(e *queued) {
	for _, a := range e.accounts {
		a.pools[p.index].running--
	}
	for _, a := range e.accounts {
		pa := &a.pools[p.index]
		for pa.waiting.head != nil && pa.running < p.perAccount {
			p.admit(pa.waiting.pop())
		}
	}
}
