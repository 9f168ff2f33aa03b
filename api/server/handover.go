package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api/wire"
)

// A daemon takes another one's place on the control socket, in messages of the
// kernel's (SOCK_SEQPACKET), each of which the other waits for:
//
//	new: replace 1
//	old: [{"name":…}, …], with the listening sockets as descriptors
//	new: go       it has prepared what it could: the old one now answers all
//	              that was sent to it, and lets go of all it holds
//	old: done     or its end: from here on the new one acts, and
//	new: serving  nothing is left for the old one to do but to end
//
// Until the last word the old one has its listening sockets still. If the other
// ends before that, it serves on.
const (
	askReplace = "replace 1"
	askGo      = "go"
	sayDone    = "done"
	sayServing = "serving"
)

const (
	// handoverWait is how long one side waits for a word of the other that
	// takes no work.
	handoverWait = 5 * time.Second
	// maxOffer bounds the message that describes the sockets, in bytes.
	maxOffer = 64 << 10
)

// offered describes a listening socket that is passed on.
type offered struct {
	Name string `json:"name"`
	// Path, Dev and Ino are those of a socket that is to be removed in the end.
	Path string `json:"path,omitempty"`
	Dev  uint64 `json:"dev,omitempty"`
	Ino  uint64 `json:"ino,omitempty"`
}

// Control is a socket on which another daemon can ask for this one's place.
type Control struct{ l *net.UnixListener }

// ListenControl makes the socket at path, in a directory of root's own. One that
// is there is a dead daemon's: the caller holds the lock of the directory.
func ListenControl(path string) (*Control, error) {
	if err := unix.Unlink(path); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("control socket: %w", &fs.PathError{Op: "unlink", Path: path, Err: err})
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := unix.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", &fs.PathError{Op: "chmod", Path: path, Err: err}), l.Close())
	}
	return &Control{l}, nil
}

// Close closes the socket and removes it.
func (c *Control) Close() error { return c.l.Close() }

// Accept waits for somebody who asks. It returns an error that wraps
// net.ErrClosed after Close, and other errors where it may be called again. Who has
// connected and does not ask is not waited for when ctx ends.
func (c *Control) Accept(ctx context.Context) (_ *Successor, err error) {
	conn, err := c.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, conn.Close())
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	p := packets{conn}
	cred, err := p.peer()
	if err != nil {
		return nil, err
	}
	if cred.Pid <= 0 || cred.Uid != 0 {
		return nil, fmt.Errorf("control socket: process %d of user %d may not ask", cred.Pid, cred.Uid)
	}
	if err := p.expect(askReplace, handoverWait); err != nil {
		return nil, fmt.Errorf("control socket: process %d: %w", cred.Pid, err)
	}
	return &Successor{PID: int(cred.Pid), p: p}, nil
}

// Successor is a daemon that asks for this one's place.
type Successor struct {
	PID int
	p   packets
}

// Close ends the conversation.
func (s *Successor) Close() error { return s.p.c.Close() }

// Offer passes the listening sockets on and returns when the other one has said
// that it is ready to serve them. They stay the caller's.
func (s *Successor) Offer(ls []*Listener) error {
	all := make([]offered, 0, len(ls))
	fds := make([]int, 0, len(ls))
	for _, l := range ls {
		o := offered{Name: l.Name()}
		if l.path != "" {
			o.Path, o.Dev, o.Ino = l.path, l.stat.Dev, l.stat.Ino
		}
		all = append(all, o)
		if err := l.control(func(fd int) error { fds = append(fds, fd); return nil }); err != nil {
			return err
		}
	}
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if err := s.p.send(b, fds...); err != nil {
		return err
	}
	return s.p.expect(askGo, 2*handoverWait)
}

// Done tells the other one that nothing is held here any more, and returns when
// it serves. An error says that it does not: it ended, or is stuck.
func (s *Successor) Done() error {
	if err := s.p.send([]byte(sayDone)); err != nil {
		return err
	}
	return s.p.expect(sayServing, 2*handoverWait)
}

// Predecessor is the daemon whose place this one is to take.
type Predecessor struct {
	PID int
	// Listeners are its listening sockets. They become the caller's by Take.
	Listeners []*Listener
	p         packets
}

// Replace asks the daemon that listens on the control socket at path for its
// place. Without one, or where it ends before it answers, it returns nil.
func Replace(path string) (_ *Predecessor, err error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("ask the running cgmanager: %w", err)
	}
	o := &Predecessor{p: packets{conn}}
	defer func() {
		switch {
		case gone(err):
			err = o.Close()
		case err != nil:
			err = errors.Join(fmt.Errorf("ask the running cgmanager (process %d) for its place: %w%s", o.PID, err, replaceHint(err)), o.Close())
		}
	}()
	cred, err := o.p.peer()
	if err != nil {
		return nil, err
	}
	if o.PID = int(cred.Pid); Defunct(o.PID) {
		return nil, o.Close()
	}
	if cred.Uid != 0 {
		// What it would say is acted upon: which files are to be removed.
		return nil, fmt.Errorf("it is user %d's (hint: the state directory must be root's own)", cred.Uid)
	}
	if err := o.p.send([]byte(askReplace)); err != nil {
		return nil, err
	}
	b, fds, err := o.p.receive(handoverWait)
	var all []offered
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err == nil && len(all) != len(fds) {
		err = fmt.Errorf("it offers %d sockets and passes %d", len(all), len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	for i, s := range all {
		l := &Listener{file: os.NewFile(uintptr(fds[i]), s.Name), path: s.Path}
		l.stat.Dev, l.stat.Ino = s.Dev, s.Ino
		o.Listeners = append(o.Listeners, l)
	}
	return o, nil
}

func replaceHint(err error) string {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return " (hint: it hangs, or is stopped: end it, and start without --replace)"
	}
	return ""
}

// Go tells the old daemon that everything is prepared, and waits until it has
// let go of all it holds, or has ended.
func (o *Predecessor) Go(drain time.Duration) error {
	// Closed by its end, which is what it is waited for.
	if err := o.p.send([]byte(askGo)); err != nil && !gone(err) {
		return err
	}
	for end := time.Now().Add(drain + handoverWait); ; {
		err := o.p.expect(sayDone, 100*time.Millisecond)
		switch {
		case err == nil, gone(err), Defunct(o.PID):
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("the running cgmanager (process %d): %w", o.PID, err)
		case time.Now().After(end):
			return fmt.Errorf("the running cgmanager (process %d) does not come to an end (hint: end it, and start without --replace)", o.PID)
		}
	}
}

// Serving tells the old daemon that it is not needed any more.
func (o *Predecessor) Serving() error {
	if err := o.p.send([]byte(sayServing)); err != nil && !gone(err) {
		return err
	}
	return nil
}

// Close ends the conversation. Until Serving, the old daemon serves on.
func (o *Predecessor) Close() error { return o.p.c.Close() }

// packets is the conversation.
type packets struct{ c *net.UnixConn }

// peer returns the credentials of the other side: who connected, or who listened.
func (p packets) peer() (cred *unix.Ucred, err error) {
	rc, err := p.c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return nil, cerr
	}
	return cred, os.NewSyscallError("getsockopt SO_PEERCRED", err)
}

func (p packets) send(b []byte, fds ...int) error {
	if len(b) > maxOffer {
		return fmt.Errorf("%d sockets are too many to pass on", len(fds))
	}
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	if err := p.c.SetWriteDeadline(time.Now().Add(handoverWait)); err != nil {
		return err
	}
	_, _, err := p.c.WriteMsgUnix(b, control, nil)
	return err
}

// receive returns the next message and what was passed with it, which is the
// caller's to close. At the end the error is io.EOF.
func (p packets) receive(wait time.Duration) ([]byte, []int, error) {
	if err := p.c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, nil, err
	}
	b, control := make([]byte, maxOffer), make([]byte, unix.CmsgSpace(4*wire.MaxFDs))
	n, cn, flags, _, err := p.c.ReadMsgUnix(b, control)
	if errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("it has closed the connection: %w", io.EOF)
	}
	if err != nil {
		return nil, nil, err
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(control[:cn])
	for _, m := range msgs {
		got, merr := unix.ParseUnixRights(&m)
		fds, err = append(fds, got...), errors.Join(err, merr)
	}
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("a message that is cut short")
	}
	return b[:n], fds, err
}

// expect waits for one message.
func (p packets) expect(want string, wait time.Duration) error {
	b, fds, err := p.receive(wait)
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	if err == nil && string(b) != want {
		err = fmt.Errorf("it says %q where %q is expected", b, want)
	}
	return err
}

// gone reports whether err says that the other side has closed.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}
