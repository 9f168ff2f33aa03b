package bus

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// The bus itself.
const (
	busName = "org.freedesktop.DBus"
	busPath = "/org/freedesktop/DBus"
)

// How long the bus may take: for an answer, and to take what is sent.
const (
	callTimeout  = 10 * time.Second
	writeTimeout = 10 * time.Second
)

// conn is a connection to a message bus. The framing is the project's own: what
// arrives on it others have sent, and the bus vouches for its form and its sender
// alone. No descriptors are agreed on: the bus lets nobody send any.
type conn struct {
	nc *net.UnixConn
	in *bufio.Reader
	// name is the unique name.
	name string
	// done is closed when the connection has ended.
	done chan struct{}

	writing sync.Mutex

	mu      sync.Mutex
	serial  uint32                   // guarded by mu
	waiting map[uint32]chan<- answer // by serial; guarded by mu; nil once it is closed
}

// answer is what the bus answers to a call, or why it does not.
type answer struct {
	m   *wire.Message
	err error
}

// refusal is an error that the bus answers.
type refusal struct{ name, text string }

func (r *refusal) Error() string { return r.name + ": " + r.text }

var errLost = errors.New("the connection to the bus is lost")

// dial connects to the first address that answers, and logs in. Nothing is read
// then before the caller starts read.
func dial(ctx context.Context, address string) (*conn, error) {
	var errs []error
	for one := range strings.SplitSeq(address, ";") {
		name, err := api.SocketName(one)
		if err != nil {
			return nil, err
		}
		c, err := dialOne(ctx, name)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func dialOne(ctx context.Context, name string) (*conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("not a Unix socket"), nc.Close())
	}
	c := &conn{nc: uc, in: bufio.NewReader(uc), done: make(chan struct{}), waiting: map[uint32]chan<- answer{}}
	stop := context.AfterFunc(ctx, func() { _ = uc.Close() })
	defer stop()
	if err := errors.Join(uc.SetDeadline(time.Now().Add(callTimeout)), c.login(), uc.SetDeadline(time.Time{})); err != nil {
		return nil, errors.Join(err, uc.Close())
	}
	return c, nil
}

// login authenticates with the uid that this process has in its own user
// namespace.
func (c *conn) login() error {
	id := fmt.Sprintf("%x", strconv.Itoa(os.Geteuid()))
	if _, err := io.WriteString(c.nc, "\x00AUTH EXTERNAL "+id+"\r\n"); err != nil {
		return err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	if !strings.HasPrefix(string(line), "OK ") {
		return fmt.Errorf("log in: the bus says %q", line)
	}
	if _, err = io.WriteString(c.nc, "BEGIN\r\n"); err != nil {
		return err
	}
	hello := toBus("Hello", "")
	if err := c.send(hello, nil); err != nil {
		return err
	}
	for {
		m, err := c.next()
		switch {
		case err != nil:
			return fmt.Errorf("log in: %w", err)
		case m == nil || m.ReplySerial != hello.Serial:
		case m.Type != wire.Return || string(m.Signature) != "s":
			return fmt.Errorf("log in: the bus refuses: %s", m.ErrorName)
		default:
			d := wire.NewDecoder(string(m.Body), m.BigEndian)
			c.name = d.String()
			return d.Close()
		}
	}
}

// read reads messages until the connection ends, and calls got for all but answers.
func (c *conn) read(got func(*wire.Message)) {
	defer close(c.done)
	for {
		m, err := c.next()
		if err != nil {
			break
		}
		switch {
		case m == nil:
		case m.Type != wire.Return && m.Type != wire.Error:
			got(m)
		case string(m.Sender) == busName: // nobody else is asked
			c.mu.Lock()
			waits := c.waiting[m.ReplySerial]
			delete(c.waiting, m.ReplySerial)
			c.mu.Unlock()
			if waits != nil {
				waits <- answer{m: m}
			}
		}
	}
	c.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, waits := range c.waiting {
		waits <- answer{err: errLost}
	}
	c.waiting = nil
}

// next returns the next message, or nil for one that no request of this project is
// like.
func (c *conn) next() (*wire.Message, error) {
	head, err := c.in.Peek(wire.HeadLength)
	if err != nil {
		return nil, err
	}
	n, err := wire.Length(head)
	if err != nil {
		return nil, err
	}
	if n > wire.MaxMessage {
		_, err = c.in.Discard(n)
		return nil, err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return nil, err
	}
	m := new(wire.Message)
	if err := m.Decode(b); err != nil {
		return nil, nil //nolint:nilerr // The bus is less strict.
	}
	return m, nil
}

// close ends the connection; calls under way fail.
func (c *conn) close() { _ = c.nc.Close() }

// send sends a message, whose serial it gives. Where that fails the connection
// ends.
func (c *conn) send(h *wire.Head, body func(*wire.Encoder)) error {
	c.mu.Lock()
	if h.Serial == 0 {
		h.Serial = c.nextLocked()
	}
	c.mu.Unlock()
	e := wire.NewMessage(nil, h)
	if body != nil {
		body(&e)
	}
	b, err := e.End()
	if err != nil {
		return err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	err = c.nc.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		_, err = c.nc.Write(b)
	}
	if err != nil {
		c.close()
	}
	return err
}

func (c *conn) nextLocked() uint32 {
	if c.serial++; c.serial == 0 {
		c.serial = 1
	}
	return c.serial
}

// toBus is the header of a call of the bus's own.
func toBus(member, sig string) *wire.Head {
	return &wire.Head{
		Type: wire.Call, Path: busPath, Interface: busName, Member: member,
		Destination: busName, Signature: sig,
	}
}

// call asks the bus something.
func (c *conn) call(ctx context.Context, member, sig string, body func(*wire.Encoder)) (*reply, error) {
	return c.ask(ctx, toBus(member, sig), body)
}

// ask makes a call and waits for the answer. The error is a *refusal where the bus
// answers with one.
func (c *conn) ask(ctx context.Context, h *wire.Head, body func(*wire.Encoder)) (*reply, error) {
	waits := make(chan answer, 1)
	c.mu.Lock()
	if c.waiting == nil {
		c.mu.Unlock()
		return nil, errLost
	}
	h.Serial = c.nextLocked()
	c.waiting[h.Serial] = waits
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, h.Serial)
	}()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := c.send(h, body); err != nil {
		return nil, err
	}
	select {
	case a := <-waits:
		if a.err != nil {
			return nil, a.err
		}
		r := &reply{wire.NewDecoder(string(a.m.Body), a.m.BigEndian), string(a.m.Signature)}
		if a.m.Type == wire.Error {
			e := &refusal{name: string(a.m.ErrorName)}
			if strings.HasPrefix(r.sig, "s") {
				e.text = r.String()
			}
			return nil, e
		}
		return r, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: the bus does not answer: %w", h.Member, ctx.Err())
	}
}

// reply is the body of an answer, of the signature sig.
type reply struct {
	wire.Decoder
	sig string
}

// callString is call with a string as the argument.
func (c *conn) callString(ctx context.Context, member, arg string) (*reply, error) {
	return c.call(ctx, member, "s", func(e *wire.Encoder) { e.String(arg) })
}

// tell is callString without waiting for an answer.
func (c *conn) tell(member, arg string) {
	h := toBus(member, "s")
	h.Flags = wire.NoReplyExpected
	_ = c.send(h, func(e *wire.Encoder) { e.String(arg) }) // a failure ends the connection
}

// listener returns the process that the kernel names as the one that listens
// (SO_PEERCRED).
func (c *conn) listener() (pid int32, err error) {
	rc, err := c.nc.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := rc.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = cred.Pid
		}
	})
	return pid, errors.Join(cerr, err)
}
