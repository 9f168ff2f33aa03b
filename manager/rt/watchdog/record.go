package watchdog

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon and process are the same program, and tell each other records of fixed
// size, each written at once (it is less than PIPE_BUF).

// order is what the daemon tells the process.
type order struct {
	kind  orderKind
	flags uint32
	grant Grant
	// With configure, in the place of a grant:
	cheep, period, grace time.Duration
}

type orderKind uint32

const (
	// retry: become realtime once more, there is a budget now.
	retry orderKind = iota + 1
	configure
	watch
	unwatch
)

const (
	demoteUnknown = 1 << iota
	demoteRoot
	// wasSuspended: the thread was demoted by the process before this one, because
	// the canary starved.
	wasSuspended
)

const orderSize = 72

func (o *order) put(b *[orderSize]byte) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], uint32(o.kind))
	le.PutUint32(b[4:], o.flags)
	le.PutUint64(b[8:], o.grant.ID)
	le.PutUint64(b[16:], o.grant.Started)
	for i, v := range []int32{o.grant.PID, o.grant.TID, o.grant.Policy, o.grant.Priority, o.grant.Nice, o.grant.Share} {
		le.PutUint32(b[24+4*i:], uint32(v))
	}
	for i, v := range []time.Duration{o.cheep, o.period, o.grace} {
		le.PutUint64(b[48+8*i:], uint64(v))
	}
}

func (o *order) get(b []byte) {
	le := binary.LittleEndian
	o.kind, o.flags = orderKind(le.Uint32(b[0:])), le.Uint32(b[4:])
	o.grant.ID, o.grant.Started = le.Uint64(b[8:]), le.Uint64(b[16:])
	o.grant.PID, o.grant.TID = int32(le.Uint32(b[24:])), int32(le.Uint32(b[28:]))
	o.grant.Policy, o.grant.Priority = int32(le.Uint32(b[32:])), int32(le.Uint32(b[36:]))
	o.grant.Nice, o.grant.Share = int32(le.Uint32(b[40:])), int32(le.Uint32(b[44:]))
	for i, v := range []*time.Duration{&o.cheep, &o.period, &o.grace} {
		*v = time.Duration(le.Uint64(b[48+8*i:]))
	}
}

// report is what the process tells the daemon: an Event, or one of the kinds below.
type report struct {
	event Event
	// With refused: what failed, and how.
	op    op
	errno unix.Errno
}

const (
	// refused: it is not realtime.
	refused EventKind = iota + 64
	// started: it is realtime, and waits to be configured.
	started
	// ready: it watches.
	ready
)

// op is something that must succeed for the process to be of use.
type op uint32

const (
	opRealtime op = iota
	opExec
	opAccount
	opLock
	opTakeOver
	opRead
)

func (o op) String() string {
	switch o {
	case opRealtime:
		return "sched_setscheduler(SCHED_FIFO, 99)"
	case opExec:
		return "exec of itself"
	case opAccount:
		return "the CPU time of its own thread in /proc (CONFIG_SCHED_INFO)"
	case opLock:
		return "mlockall"
	case opTakeOver:
		return "taking the place of a watchdog that outlived its daemon"
	case opRead:
		return "reading its orders"
	}
	return "?"
}

const reportSize = 40

func (r *report) put(b *[reportSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], uint64(r.event.Kind))
	le.PutUint64(b[8:], r.event.ID)
	le.PutUint64(b[16:], uint64(r.event.Used))
	le.PutUint64(b[24:], uint64(r.event.Window))
	le.PutUint32(b[32:], uint32(r.op))
	le.PutUint32(b[36:], uint32(r.errno))
}

func (r *report) get(b []byte) {
	le := binary.LittleEndian
	r.event.Kind, r.event.ID = EventKind(le.Uint64(b[0:])), le.Uint64(b[8:])
	r.event.Used, r.event.Window = time.Duration(le.Uint64(b[16:])), time.Duration(le.Uint64(b[24:]))
	r.op, r.errno = op(le.Uint32(b[32:])), unix.Errno(le.Uint32(b[36:]))
}
