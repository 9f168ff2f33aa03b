// Package polkit asks polkit whether somebody may do something.
package polkit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// ErrAbsent says that there is no system bus, or no polkit on it.
var ErrAbsent = errors.New("polkit does not run here")

const (
	name  = "org.freedesktop.PolicyKit1"
	path  = "/org/freedesktop/PolicyKit1/Authority"
	iface = "org.freedesktop.PolicyKit1.Authority"
)

// maxPending is how many questions may be open at a time. More wait their turn. A bus
// takes 128 of a connection (max_replies_per_connection, dbus-daemon(1)), and those
// that were taken back count until polkit says so.
const maxPending = 100

// Subject is a process for which is asked: polkit's "unix-process".
type Subject struct {
	PID uint32
	// Started is when it was started (field 22, proc_pid_stat(5)).
	Started uint64
	// UID is that of who asks for it.
	UID uint32
}

// Authority is polkit on the system bus. It connects when it is first asked, and
// again where the bus was lost.
type Authority struct {
	address string
	pending chan struct{} // holds one for each open question
	asked   atomic.Uint64
	// ctx ends with Close, and every connection with it.
	ctx   context.Context
	close context.CancelFunc

	// mu is held while connecting; nobody waits for it but the goroutines of Check.
	mu   sync.Mutex
	conn *dbus.Conn // guarded by mu; nil or lost: the next question connects
}

// New makes an Authority. address is that of the bus, "" that of the system.
func New(address string) *Authority {
	a := &Authority{address: address, pending: make(chan struct{}, maxPending)}
	a.ctx, a.close = context.WithCancel(context.Background())
	return a
}

// Close lets go of the bus. Questions that are open end with an error.
func (a *Authority) Close() { a.close() }

// Check asks whether the subject may do what the action says, without asking its
// user. Answers come in any order; ctx bounds the time, also where the bus hangs. The
// error wraps ErrAbsent where there is nobody to ask. Its text, which may hold what
// polkit says, is for the log.
func (a *Authority) Check(ctx context.Context, action string, s Subject) (bool, error) {
	type answer struct {
		yes bool
		err error
	}
	late := func() error { return fmt.Errorf("ask polkit about %s: no answer in time: %w", action, ctx.Err()) }
	select {
	case a.pending <- struct{}{}:
	case <-ctx.Done():
		return false, late()
	}
	// What is written to a bus that does not read waits, whatever ctx says.
	answered := make(chan answer, 1)
	go func() {
		defer func() { <-a.pending }()
		yes, err := a.ask(ctx, action, s)
		answered <- answer{yes, err}
	}()
	select {
	case is := <-answered:
		if is.err != nil && ctx.Err() != nil {
			return false, late()
		}
		if is.err != nil {
			return false, fmt.Errorf("ask polkit about %s: %w", action, is.err)
		}
		return is.yes, nil
	case <-ctx.Done():
		return false, late()
	}
}

func (a *Authority) ask(ctx context.Context, action string, s Subject) (bool, error) {
	conn, err := a.connection(ctx)
	if err != nil {
		return false, err
	}
	polkit := conn.Object(name, path)
	// Names the question among those of this connection.
	id := strconv.FormatUint(a.asked.Add(1), 10)
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"unix-process", map[string]dbus.Variant{
		"pid":        dbus.MakeVariant(s.PID),
		"start-time": dbus.MakeVariant(s.Started),
		// Of another type polkit does not see it, and takes the process's own.
		"uid": dbus.MakeVariant(int32(s.UID)),
	}}
	call := polkit.CallWithContext(ctx, iface+".CheckAuthorization", 0, subject, action, map[string]string{}, uint32(0), id)
	if ctx.Err() != nil {
		polkit.Go(iface+".CancelCheckAuthorization", dbus.FlagNoReplyExpected, nil, id)
		return false, ctx.Err()
	}
	if e, ok := errors.AsType[dbus.Error](call.Err); ok {
		switch e.Name {
		case "org.freedesktop.DBus.Error.ServiceUnknown",
			"org.freedesktop.DBus.Error.NameHasNoOwner",
			"org.freedesktop.DBus.Error.Spawn.ServiceNotFound":
			return false, fmt.Errorf("%w: %s", ErrAbsent, e.Name)
		}
		return false, fmt.Errorf("%s: %w", e.Name, e)
	}
	if call.Err != nil {
		return false, call.Err
	}
	// (bba{ss}): whether it may, whether it might after a log-in, details. The library
	// would take what is merely like it.
	if len(call.Body) == 1 {
		if result, ok := call.Body[0].([]any); ok && len(result) == 3 {
			yes, ok := result[0].(bool)
			_, ok1 := result[1].(bool)
			_, ok2 := result[2].(map[string]string)
			if ok && ok1 && ok2 {
				return yes, nil
			}
		}
	}
	return false, errors.New("the answer is malformed")
}

// connection returns the one there is, or makes one.
func (a *Authority) connection(ctx context.Context) (*dbus.Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if a.conn != nil && a.conn.Connected() {
		return a.conn, nil
	}
	a.conn = nil
	dial := dbus.SystemBusPrivate
	if a.address != "" {
		dial = func(opts ...dbus.ConnOption) (*dbus.Conn, error) { return dbus.Dial(a.address, opts...) }
	}
	conn, err := dial(dbus.WithContext(a.ctx))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", ErrAbsent, err)
	}
	if err != nil {
		return nil, err
	}
	// A bus that does not answer is not waited for longer than the question.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	a.conn = conn
	return conn, nil
}
