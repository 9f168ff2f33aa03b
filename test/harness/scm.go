package harness

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// scmTimeout is how long a client waits on the side channel, on a machine that
// has nothing else to do.
const scmTimeout = 5 * time.Second

// Exchange is the side channel of an *Scm call: the process P holds one end
// of an unnamed pair of datagram sockets, the daemon the other.
type Exchange struct {
	P  *Proc
	fd int
}

// OpenScm makes an *Scm call with a new side channel and waits for its reply.
func (c *Conn) OpenScm(member string, args ...any) (*Exchange, error) {
	ours, theirs := c.P.Socketpair(unix.SOCK_DGRAM)
	defer c.P.Close(theirs)
	c.P.PassCred(ours) // before the daemon can send: it counts when sending
	x := &Exchange{P: c.P, fd: ours}
	if _, err := c.V0(member, append(args, FD(theirs))...); err != nil {
		x.Close()
		return nil, err
	}
	return x, nil
}

// Give hands the side channel to another process.
func (x *Exchange) Give(q *Proc) *Exchange {
	fd := x.P.Give(x.fd, q)
	return &Exchange{P: q, fd: fd}
}

// Open reports whether the daemon still has its end. It writes a byte, which
// nobody reads after the result.
func (x *Exchange) Open() bool { return x.P.Send(x.fd, []byte{0}, nil) == nil }

// Close closes P's end.
func (x *Exchange) Close() { x.P.Close(x.fd) }

// Kick waits until the daemon asks for a credential and answers with cred, by
// the numbers of P's namespaces.
func (x *Exchange) Kick(cred Cred) error { return x.kick(&cred) }

// KickSelf is Kick with P's own credential, which the kernel fills in: also
// that of a process whose ids have no numbers in its own user namespace.
func (x *Exchange) KickSelf() error { return x.kick(nil) }

func (x *Exchange) kick(cred *Cred) error {
	d, err := x.P.Recv(x.fd, scmTimeout)
	if err != nil {
		return scmError(err)
	}
	if string(d.Data) != "1" {
		return fmt.Errorf("%w: %q instead of a kick", ErrScmRefused, d.Data)
	}
	return scmError(x.P.Send(x.fd, []byte{0}, cred))
}

// Result returns the next datagram.
func (x *Exchange) Result() (Datagram, error) {
	d, err := x.P.Recv(x.fd, scmTimeout)
	return d, scmError(err)
}

// scmError: the daemon that lets go of its end refuses.
func scmError(err error) error {
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("%w: %w", ErrScmRefused, err)
	}
	return err
}

// Credentials says how many an *Scm method asks for.
func Credentials(member string) int {
	for _, p := range []string{"MovePid", "GetPidCgroup", "Chown"} {
		if strings.HasPrefix(member, p) {
			return 2
		}
	}
	return 1
}

// Scm makes a whole *Scm call. creds are the requestor and, where the method
// wants one, the victim or owner. The result is a string for GetValueScm and
// GetPidCgroup*Scm, the one character for calls that do something, []int32 for
// tasks (by the numbers of P), and []string for ListChildrenScm and (a line
// for each field) ListKeysScm.
func (c *Conn) Scm(member string, creds []Cred, args ...any) (any, error) {
	x, err := c.OpenScm(member, args...)
	if err != nil {
		return nil, err
	}
	defer x.Close()
	for _, cr := range creds {
		if err := x.Kick(cr); err != nil {
			return nil, err
		}
	}
	return x.Finish(member)
}

// Finish reads the result of a method after its credentials were sent.
func (x *Exchange) Finish(member string) (any, error) {
	d, err := x.Result()
	if err != nil {
		return nil, err
	}
	switch {
	case strings.HasPrefix(member, "GetValue"), strings.HasPrefix(member, "GetPidCgroup"):
		if len(d.Data) == 0 {
			return nil, ErrScmRefused
		}
		return strings.TrimSuffix(string(d.Data), "\x00"), nil
	case strings.HasPrefix(member, "GetTasks"):
		n, err := count(d)
		if err != nil {
			return nil, err
		}
		pids := []int32{}
		for range n {
			d, err := x.Result()
			if err != nil {
				return nil, err
			}
			if string(d.Data) != "p" || d.Cred == nil {
				return nil, fmt.Errorf("%s: datagram %q with %v", member, d.Data, d.Cred)
			}
			pids = append(pids, d.Cred.PID)
		}
		return pids, nil
	case strings.HasPrefix(member, "List"):
		n, err := count(d)
		if err != nil || n == 0 {
			return []string{}, err
		}
		if d, err = x.Result(); err != nil {
			return nil, err
		}
		size, err := count(d)
		if err != nil {
			return nil, err
		}
		sep := "\n"
		if strings.HasPrefix(member, "ListChildren") {
			sep = "\x00"
		}
		var blob []byte
		for len(blob) < size {
			if d, err = x.Result(); err != nil {
				return nil, err
			}
			if len(d.Data) == 0 {
				return nil, fmt.Errorf("%s: %d of %d bytes", member, len(blob), size)
			}
			blob = append(blob, d.Data...)
		}
		s := strings.TrimRight(string(blob), "\x00\n")
		return strings.Split(s, sep), nil
	}
	if string(d.Data) == "0" {
		return nil, ErrScmRefused
	}
	return string(d.Data), nil
}

func count(d Datagram) (int, error) {
	if len(d.Data) != 4 {
		return 0, fmt.Errorf("a count of %d bytes", len(d.Data))
	}
	n := int32(binary.NativeEndian.Uint32(d.Data))
	if n < 0 {
		return 0, ErrScmRefused
	}
	return int(n), nil
}
