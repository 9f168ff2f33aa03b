package proxy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"cgmanager/api"
	"cgmanager/api/wire"
)

const (
	// maxPause is the longest time between two looks for the daemon below.
	maxPause = 100 * time.Millisecond
	// loginTime is what a login may take at least, however little is left to
	// wait.
	loginTime = 2 * time.Second
)

// try makes a request by f and returns what to tell the client.
func (c *peer) try(op string, changes bool, f func(*lower) error) error {
	err := c.persist(changes, f)
	if err == nil {
		c.p.isUp()
		return nil
	}
	var (
		refused *refusal
		lost    *lostError
		ours    *api.Error
	)
	switch {
	case errors.As(err, &refused):
		c.p.isUp()
		return refused.asError(op)
	case errors.As(err, &ours):
		return &api.Error{Kind: ours.Kind, Text: withOp(op, ours.Text), Hint: ours.Hint, Cause: ours.Cause}
	case !errors.As(err, &lost):
		return api.AsError(err)
	}
	c.p.isDown(lost)
	switch {
	case lost.read && changes:
		return api.Errorf(api.Busy, "%s: the daemon below the proxy ended before it answered: the request may have been carried out", op).
			WithHint("look whether it was, before you ask again").WithCause(lost)
	case lost.read:
		return api.Errorf(api.Busy, "%s: the daemon below the proxy did not answer", op).WithHint("ask again").WithCause(lost)
	}
	return api.Errorf(api.Busy, "%s: the daemon below the proxy cannot be reached; the request was not carried out", op).
		WithHint("ask again once cgmanager runs on the host").WithCause(lost)
}

// withOp begins a text with the operation, unless it does.
func withOp(op, text string) string {
	if len(text) > len(op) && text[:len(op)] == op {
		return text
	}
	return op + ": " + text
}

// isUp and isDown write to the log what becomes of the daemon below, once. A
// client for whom there is no more room below, and another one for whom there is,
// make it go up and down as they like: so many lines a second are written.
func (p *Proxy) isUp() {
	if p.down.Load() && p.down.CompareAndSwap(true, false) && p.lines.Allow() {
		p.log.Info("the daemon below answers again")
	}
}

func (p *Proxy) isDown(err error) {
	if p.down.CompareAndSwap(false, true) && p.lines.Allow() {
		p.log.WithError(err).Warn("the daemon below does not answer")
	}
}

// persist runs f on the connection below, which it makes anew if need be. It
// runs f again where the connection was lost and the request was surely not
// carried out, or changes nothing, for as long as requests wait.
func (c *peer) persist(changes bool, f func(*lower) error) error {
	giveUp := time.Now().Add(c.p.wait)
	var pause time.Duration // none at first: the daemon may be back long since
	for {
		err := c.connect(giveUp)
		if err == nil {
			err = f(c.lower)
		}
		var lost *lostError
		if !errors.As(err, &lost) {
			return err
		}
		c.hangUp()
		left := time.Until(giveUp)
		if lost.read && changes || lost.lasting || left <= 0 {
			return err
		}
		if pause > 0 {
			c.p.isDown(lost)
		}
		select {
		case <-c.p.ending:
			return err
		case <-time.After(min(pause, left)):
		}
		pause = min(2*pause+time.Millisecond, maxPause)
	}
}

// connect makes sure that there is a connection below that knows every hop.
func (c *peer) connect(giveUp time.Time) error {
	if c.lower == nil {
		deadline := time.Now().Add(loginTime)
		if giveUp.After(deadline) {
			deadline = giveUp
		}
		l, err := dialLower(c.p.lower, deadline)
		if err != nil {
			return notCarriedOut(err)
		}
		c.lower = l
	}
	err := c.passHops()
	if err != nil {
		c.hangUp()
		return notCarriedOut(err)
	}
	return nil
}

// passHops tells the daemon below of the hops that it does not know.
func (c *peer) passHops() error {
	l := c.lower
	for l.passed < len(c.hops) && !l.original {
		h := c.hops[l.passed]
		if !h.alive() {
			return goneError()
		}
		if err := l.actFor(h.cred); err != nil {
			return err
		}
		// Now the daemon has a handle on whoever has the number. If it is
		// still this process's, it had it then.
		if !h.alive() {
			return goneError()
		}
		if l.original {
			return l.checkVersion(h.cred)
		}
		l.passed++
	}
	return nil
}

func goneError() error {
	return api.Errorf(api.Denied, "the process that opened the connection has ended").WithCause(errGone)
}

// notCarriedOut is err of what comes before the request.
func notCarriedOut(err error) error {
	if lost, ok := errors.AsType[*lostError](err); ok {
		return &lostError{err: lost.err, lasting: lost.lasting}
	}
	return err
}

// speaks makes sure that a number that is to be named to the daemon below is
// still that of the process that the proxy has a handle on, if it is one.
func (c *peer) speaks(cred api.Cred) error {
	for _, h := range c.hops {
		if h.cred.PID == cred.PID && !h.alive() {
			return goneError()
		}
	}
	return nil
}

// answer is what a method returns; which part of it counts, the signature of the
// method says.
type answer struct {
	text    string
	names   []string
	number  int32
	pids    []int32
	keys    []api.Key
	values  map[string]string
	visible []uint32
	hidden  uint32
	created bool
	grants  []api.Grant
	// realtime are the properties of RealtimeKit1.
	realtime api.RealtimeProperties
}

// decode reads the values of an answer that has the signature.
func (a *answer) decode(sig string, d *wire.Decoder) error {
	switch sig {
	case "s":
		a.text = d.String()
	case "i":
		a.number = int32(d.Uint32())
	case "b":
		a.created = d.Bool()
	case "as":
		a.names = d.Strings()
	case "ai":
		d.Array(4, func() { a.pids = append(a.pids, int32(d.Uint32())) })
	case "au":
		d.Array(4, func() { a.visible = append(a.visible, d.Uint32()) })
	case "auu":
		d.Array(4, func() { a.visible = append(a.visible, d.Uint32()) })
		a.hidden = d.Uint32()
	case "a{ss}":
		a.values, _, _ = d.Dict()
	case "a(suuu)":
		d.Array(8, func() {
			a.keys = append(a.keys, api.Key{Name: d.String(), UID: d.Uint32(), GID: d.Uint32(), Mode: d.Uint32()})
		})
	case "a(uuusixts)":
		d.Array(8, func() {
			a.grants = append(a.grants, api.Grant{
				PID: d.Uint32(), TID: d.Uint32(), UID: d.Uint32(), Policy: d.String(), Level: int32(d.Uint32()),
				Since: int64(d.Uint64()), CPU: d.Uint64(), State: d.String(),
			})
		})
	case "a{sv}":
		return a.decodeProperties(d)
	}
	return d.Close()
}

// decodeProperties reads the properties of RealtimeKit1: all of them, in their
// types. Others may be there.
func (a *answer) decodeProperties(d *wire.Decoder) error {
	types := map[string]string{"RTTimeUSecMax": "x", "MaxRealtimePriority": "i", "MinNiceLevel": "i"}
	values := map[string]int64{}
	wrong := ""
	d.Array(8, func() {
		name := d.String()
		if types[name] == "" {
			d.Skip("v")
			return
		}
		sig, value := d.Variant()
		if values[name] = value; sig != types[name] {
			wrong = name
		}
	})
	if err := d.Close(); err != nil {
		return err
	}
	if wrong != "" || len(values) != len(types) {
		return fmt.Errorf("its properties of realtime are of other types, or not there: %q", wrong)
	}
	a.realtime = api.RealtimeProperties{
		RTTimeUSecMax:       values["RTTimeUSecMax"],
		MaxRealtimePriority: int32(values["MaxRealtimePriority"]),
		MinNiceLevel:        int32(values["MinNiceLevel"]),
	}
	return nil
}

// methods finds a method by interface, name and the signature of its arguments.
var methods = func() map[[3]string]*api.Method {
	all := map[[3]string]*api.Method{}
	for _, i := range api.Interfaces() {
		for _, m := range i.Methods {
			all[[3]string{i.Name, m.Name, m.InSignature()}] = &m
		}
	}
	return all
}()

// method returns a method that is in the table.
func method(iface, name, sig string) *api.Method { return methods[[3]string{iface, name, sig}] }

// arguments are those of a call, of the types string, int32, uint32, uint64, []string,
// map[string]string and handle.
type arguments []any

// handle0 is the first descriptor of a message.
type handle0 struct{}

// signature returns the D-Bus signature of the arguments.
func (as arguments) signature() string {
	var sig strings.Builder
	for _, a := range as {
		switch a.(type) {
		case string:
			sig.WriteString("s")
		case int32:
			sig.WriteString("i")
		case uint32:
			sig.WriteString("u")
		case uint64:
			sig.WriteString("t")
		case []string:
			sig.WriteString("as")
		case map[string]string:
			sig.WriteString("a{ss}")
		case handle0:
			sig.WriteString("h")
		}
	}
	return sig.String()
}

// encode writes the arguments.
func (as arguments) encode(e *wire.Encoder) {
	for _, a := range as {
		switch v := a.(type) {
		case string:
			e.String(v)
		case int32:
			e.Int32(v)
		case uint32:
			e.Uint32(v)
		case uint64:
			e.Uint64(v)
		case []string:
			e.Strings(v)
		case map[string]string:
			e.Dict(v)
		case handle0:
			e.Uint32(0)
		}
	}
}

// ask makes a call of one interface of the object at path as it is.
func (l *lower) ask(c *peer, rq *api.Request, path, iface string, m *api.Method, args arguments, fd int) (a answer, err error) {
	if err := c.speaks(rq.Sender); err != nil {
		return a, err
	}
	d, err := l.call(rq.Sender, path, iface, m, args.encode, fd)
	if err != nil {
		return a, err
	}
	if err := a.decode(m.OutSignature(), &d); err != nil {
		return a, &lostError{err: err, read: true, lasting: true}
	}
	return a, nil
}

// lostRead tells what became of a connection from which nothing came.
func lostRead(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("it closed the connection")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it did not answer in time: %w", os.ErrDeadlineExceeded)
	}
	return systemError(err)
}
