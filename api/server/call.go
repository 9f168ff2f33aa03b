package server

import (
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// handle answers a message: at once, appending to out, or by handing it to the
// Backend. It returns an error where the connection must end. Called with mu
// held.
func (c *conn) handle(m *wire.Message, out []byte) ([]byte, error) {
	fds := c.takeFDs(m)
	if m.Type != wire.Call {
		c.s.closeForeign(c.accounts, fds)
		return out, nil
	}
	mt := c.s.methods.find(m)
	switch {
	case mt == nil:
		out = c.fail(out, m, nameUnknownMethod, unknownMethod(m))
	case mt.in != string(m.Signature) && !mt.lenient:
		out = c.fail(out, m, nameInvalidArgs, "Invalid arguments to "+mt.Name+" method")
	case !mt.lenient && (len(fds) > 1 || !mt.takesFD && m.UnixFDs > 0):
		out = c.fail(out, m, nameInvalidArgs, "Invalid file descriptors for "+mt.Name+" method")
	default:
		a := &c.s.args
		*a = args{}
		if err := a.decode(mt, m); err != nil {
			c.s.closeForeign(c.accounts, fds)
			return out, err
		}
		switch {
		case a.dup:
			out = c.fail(out, m, nameInvalidArgs, clip("key "+quote(a.twice)+" is given twice"))
		case mt.local != nil:
			out = mt.local(c, m, a, out)
		case !mt.takesFD:
			out = c.submit(mt, m, a, -1, out)
		case len(fds) == 0 || a.handle != 0:
			// The text that the original's clients know.
			out = c.fail(out, m, nameInvalidArgs, "Failed to set passcred: Bad file descriptor")
		case mt.Scm:
			var ok bool
			if out, ok = c.exchange(mt, m, a, fds[0], out); ok {
				return out, nil
			}
		default:
			return c.submit(mt, m, a, fds[0], out), nil
		}
	}
	c.s.closeForeign(c.accounts, fds)
	return out, nil
}

// nextSerial returns the serial of the next answer.
func (c *conn) nextSerial() uint32 {
	if c.serial++; c.serial == 0 {
		c.serial = 1
	}
	return c.serial
}

// fail appends an error as the answer to m, if m wants one.
func (c *conn) fail(out []byte, m *wire.Message, name, text string) []byte {
	if !m.WantsReply() {
		return out
	}
	return wire.AppendError(out, c.nextSerial(), m.Serial, name, text)
}

// empty appends an answer without values to m, if m wants one.
func (c *conn) empty(out []byte, m *wire.Message) []byte {
	return c.answer(out, m, "", nil)
}

// answer appends an answer to m, if m wants one. body writes values of the
// signature sig that are known to be good.
func (c *conn) answer(out []byte, m *wire.Message, sig string, body func(*wire.Encoder)) []byte {
	if !m.WantsReply() {
		return out
	}
	e := wire.NewReturn(out, c.nextSerial(), m.Serial, sig)
	if body != nil {
		body(&e)
	}
	out, err := e.End()
	if err != nil {
		return wire.AppendError(out, c.serial, m.Serial, nameFailed, err.Error())
	}
	return out
}

// request says who asks with m.
func (c *conn) request() api.Request {
	return api.Request{Peer: c.peer, Opener: c.opener, Sender: c.sender}
}

// spend charges a change to the peer's accounts.
func (c *conn) spend() bool {
	if len(c.accounts) == 0 {
		return true
	}
	now, ok := time.Now(), true
	for _, a := range c.accounts {
		ok = a.spend(&c.s.limits, now) && ok
	}
	return ok
}

func tooManyChanges(mt *method) error {
	return api.Errorf(api.Limit, "%s: too many changes a second", mt.Name).WithHint("wait a second")
}

// job is a request that the Backend answers, as a task.
type job struct {
	c      *conn
	method *method
	rq     api.Request
	args   args
	fd     int // passed with the request, or -1
	serial uint32
	reply  uint32 // to which serial; 0 if the caller wants no answer
}

// submit hands a request to the Backend.
func (c *conn) submit(mt *method, m *wire.Message, a *args, fd int, out []byte) []byte {
	if mt.Changes && !c.spend() {
		if m.WantsReply() {
			out = c.s.appendFailure(out, mt.iface, c.nextSerial(), m.Serial, tooManyChanges(mt))
		}
		if fd >= 0 {
			c.s.closeForeign(c.accounts, []int{fd})
		}
		return out
	}
	if mt.Holds && !c.hold() {
		if m.WantsReply() {
			err := api.Errorf(api.Limit, "%s: too many connections, and processes for whom they act", mt.Name)
			out = c.s.appendFailure(out, mt.iface, c.nextSerial(), m.Serial, err)
		}
		return out
	}
	j := &job{c: c, method: mt, rq: c.request(), args: *a, fd: fd}
	if m.WantsReply() {
		j.serial, j.reply = c.nextSerial(), m.Serial
	}
	c.busy = true
	c.refs++
	if mt.Asks {
		c.s.askers.submit(j, c.accounts)
	} else {
		c.s.workers.submit(j, c.accounts)
	}
	return out
}

func (j *job) run(buf []byte) []byte {
	c, s := j.c, j.c.s
	s.mu.Lock()
	closed := c.closed
	s.mu.Unlock()
	out, done := buf[:0], false
	if !closed {
		out, done = j.answer(out)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.method.Holds && !done {
		c.charged(-1)
		s.resumeIfRoom()
	}
	if j.fd >= 0 {
		s.closeForeign(c.accounts, []int{j.fd})
	}
	c.busy = false
	if !c.closed {
		out = c.advance(c.in, out)
	}
	c.unref()
	return out
}

// answer asks the Backend and appends the answer to out. It reports whether the
// Backend has done what was asked.
func (j *job) answer(out []byte) (_ []byte, done bool) {
	s := j.c.s
	r, err := s.call(j.method, &j.rq, &j.args, j.fd)
	done = err == nil
	if j.reply == 0 {
		return out, done
	}
	if err == nil {
		e := wire.NewReturn(out, j.serial, j.reply, j.method.out)
		j.method.encode(&e, &r)
		switch out, err = e.End(); {
		case err != nil:
			err = api.Errorf(api.Unsupported, "%s: the answer has text in it that is %v", j.method.Name, err)
		case len(out) > wire.MaxReply:
			out = out[:0]
			err = api.Errorf(api.Limit, "%s: the answer is longer than %d bytes", j.method.Name, wire.MaxReply)
		}
	}
	if err != nil {
		out = s.appendFailure(out, j.method.iface, j.serial, j.reply, err)
	}
	return out, done
}

// call calls the Backend's method.
func (s *Server) call(mt *method, rq *api.Request, a *args, fd int) (r result, err error) {
	defer s.recovered(&err)
	if mt.pidfd != nil {
		// Asks nothing of a file system, unlike most that can be asked of a
		// stranger's descriptor: EBADF says that it is no pidfd.
		if err := unix.PidfdSendSignal(fd, 0, nil, 0); err == unix.EBADF {
			return r, api.Errorf(api.Invalid, "%s: the file descriptor is not a pidfd", mt.Name)
		}
		return r, mt.pidfd(s.backend, rq, a, fd)
	}
	if mt.lenient && len(mt.In) > 0 {
		// Whom rtkit refuses for now it refuses before it looks at arguments.
		if err := s.backend.RealtimeRefused(rq); err != nil {
			return r, err
		}
	}
	if a.wrong != "" {
		return r, a.wrong
	}
	return mt.call(s.backend, rq, a)
}

// args are the arguments of a call, by type, in order.
type args struct {
	s      [4]string
	n      [2]uint32 // i and u
	t      [2]uint64
	handle uint32 // h: an index into the message's descriptors
	list   []string
	dict   map[string]string
	twice  string // a key that dict was given twice, ...
	dup    bool   // ... if it was
	// wrong is what is wrong with the arguments of a lenient method; they are
	// not there then.
	wrong wire.ArgumentError
	// victim and owner come as numbers, or as a credential where the call
	// has a side channel.
	victim api.Victim
	owner  api.Owner
}

// decode reads m's body. It returns an error wrapping wire.ErrMalformed.
func (a *args) decode(mt *method, m *wire.Message) error {
	d := wire.NewDecoder(string(m.Body), m.BigEndian)
	if mt.lenient {
		if a.wrong = wire.WrongArguments(mt.In, string(m.Signature)); a.wrong != "" {
			d.Skip(string(m.Signature))
			return d.Close()
		}
	}
	var s, n, t int
	for _, arg := range mt.In {
		switch arg.Type {
		case "s":
			a.s[s] = d.String()
			s++
		case "i", "u":
			a.n[n] = d.Uint32()
			n++
		case "t":
			a.t[t] = d.Uint64()
			t++
		case "h":
			a.handle = d.Uint32()
		case "as":
			a.list = d.Strings()
		case "a{ss}":
			a.dict, a.twice, a.dup = d.Dict()
		default:
			d.Skip(arg.Type)
		}
	}
	switch mt.second {
	case nobody:
	case victim:
		a.victim.PID = int64(int32(a.n[0]))
	case owner:
		a.owner = api.Owner{UID: a.n[0], GID: a.n[1]}
	}
	if mt.lenient {
		d.Skip(string(m.Signature[len(mt.in):]))
	}
	return d.Close()
}
