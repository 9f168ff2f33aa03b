package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// AddressVariable is the environment variable that names the daemon's address:
// a D-Bus address (unix:path=…, unix:abstract=…) or the bare path of a socket.
const AddressVariable = "CGMANAGER_ADDRESS"

// DefaultTimeout bounds the login and each call whose context has no deadline.
// It is what libdbus waits for a reply by default.
const DefaultTimeout = 25 * time.Second

// defaultPaths are where a daemon listens, in the order in which to look.
var defaultPaths = []string{
	"/sys/fs/cgroup/manager",
	"/sys/fs/cgroup/cgmanager/sock",
	"/run/cgmanager/sock",
}

// Addresses returns the D-Bus addresses to try, in order: the one in
// $CGMANAGER_ADDRESS alone if that is set, else the well-known sockets.
func Addresses() []string {
	if a := os.Getenv(AddressVariable); a != "" {
		return []string{a}
	}
	as := make([]string, len(defaultPaths))
	for i, p := range defaultPaths {
		as[i] = "unix:path=" + p
	}
	return as
}

// UnreachableError says that no daemon was found.
type UnreachableError struct {
	// Tried holds what happened, one for each address, in order.
	Tried []error
}

// Error names every address that was tried, with the reason.
func (e *UnreachableError) Error() string {
	return "cannot reach cgmanager: " + strings.ReplaceAll(errors.Join(e.Tried...).Error(), "\n", "; ")
}

// Unwrap returns what happened at each address.
func (e *UnreachableError) Unwrap() []error { return e.Tried }

// Hint says what to do about it.
func (e *UnreachableError) Hint() string {
	if errors.Is(e, unix.EACCES) {
		return "somebody must open the socket, and the directories above it, to you"
	}
	return "is cgmanager running? In a container, bind-mount the host's /run/cgmanager; elsewhere set " + AddressVariable
}

// loginError says in words why nobody could log in.
type loginError struct {
	text, hint string
	err        error
}

func (e *loginError) Error() string { return e.text }
func (e *loginError) Unwrap() error { return e.err }

// Hint says what to do about it.
func (e *loginError) Hint() string { return e.hint }

// loginFailure returns err in words, if it is one that has none for a user.
func loginFailure(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &loginError{"no answer in time", "look whether the daemon is stopped, or very busy", err}
	case gone(err):
		return &loginError{"it closed the connection", "a proxy serves its own container alone, and everybody has a bounded number of connections; the log of the other side says more", err}
	}
	return err
}

// Client is a connection to a daemon. Its methods may be called from several
// goroutines at once.
type Client struct {
	conn *dbus.Conn
	// The objects that the daemon serves.
	cgroups, realtime dbus.BusObject
	address           string
}

// Dial connects to the daemon at the first of Addresses that answers, and logs
// in. If none does, the error is an *UnreachableError.
func Dial(ctx context.Context) (*Client, error) {
	return DialAddress(ctx, Addresses()...)
}

// DialAddress is Dial with the addresses given: D-Bus addresses of the
// transport unix, or bare paths.
func DialAddress(ctx context.Context, addresses ...string) (*Client, error) {
	var each []string
	for _, a := range addresses {
		parsed, err := parseAddress(a)
		if err != nil {
			return nil, err
		}
		each = append(each, parsed...)
	}
	var tried []error
	for _, address := range each {
		conn, err := dial(ctx, address)
		if gone(err) {
			// The daemon was replaced meanwhile. Nothing has been asked of it.
			conn, err = dial(ctx, address)
		}
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			tried = append(tried, fmt.Errorf("%s: %w", address, reason(err)))
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("log in to cgmanager at %s: %w", address, loginFailure(reason(err)))
		}
		// The library always sends a destination; the daemon ignores which.
		return &Client{
			conn: conn, address: address,
			cgroups:  conn.Object(api.BusName, api.ObjectPath),
			realtime: conn.Object(api.BusName, api.RealtimePath),
		}, nil
	}
	return nil, &UnreachableError{Tried: tried}
}

// dial connects and logs in. Where nobody can be reached the error is of a "dial".
func dial(ctx context.Context, address string) (*dbus.Conn, error) {
	conn, err := dbus.Dial(address)
	if err != nil {
		return nil, err
	}
	return conn, login(ctx, conn)
}

// login authenticates conn, and closes it on failure. The library's handshake
// knows no deadline: the connection is closed under it instead.
func login(ctx context.Context, conn *dbus.Conn) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	// The daemon compares the number after translation through the uid_map
	// of this process: it is the uid of the caller's own namespace.
	err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))})
	if !stop() {
		return ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
	}
	return err
}

// CheckAddress returns an error if a is no address for DialAddress.
func CheckAddress(a string) error {
	_, err := parseAddress(a)
	return err
}

// parseAddress returns the D-Bus addresses in a, all of the transport unix.
// Others are refused: the daemon takes who asks from the kernel, which only
// this transport tells it.
func parseAddress(a string) ([]string, error) {
	if strings.HasPrefix(a, "/") {
		return []string{"unix:path=" + dbus.EscapeBusAddressValue(a)}, nil
	}
	each := strings.Split(a, ";")
	for _, one := range each {
		if _, err := api.SocketName(one); err != nil {
			return nil, fmt.Errorf("address %q: %w", a, err)
		}
	}
	return each, nil
}

// reason strips what net wraps around the system's error: the address is named
// already.
func reason(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if sys, ok := errors.AsType[*os.SyscallError](err); ok {
		err = sys.Err
	}
	return err
}

func withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}

// Close ends the connection. Calls under way fail.
func (c *Client) Close() error { return c.conn.Close() }

// Address returns the D-Bus address at which the daemon was found.
func (c *Client) Address() string { return c.address }

// Daemon returns the credentials of whoever listens at the client's address,
// as the kernel recorded them at listen(2) (SO_PEERCRED, unix(7)), in the
// numbers of the caller's namespaces: pid 0 is a process outside the caller's
// pid namespace, uid 65534 one that is not mapped.
func (c *Client) Daemon() (pid int32, uid, gid uint32, err error) {
	// The library does not show its socket, hence one more connection.
	name, err := api.SocketName(c.address)
	if err != nil {
		return 0, 0, 0, err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() { _ = conn.Close() }()
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, 0, 0, err
	}
	var cred *unix.Ucred
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, sockErr); err != nil {
		return 0, 0, 0, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	return cred.Pid, cred.Uid, cred.Gid, nil
}
