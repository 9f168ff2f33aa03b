package bus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"cgmanager/api"
)

// caller is who has a unique name on the bus: a connection of its own, to the
// Backend.
type caller struct {
	name string
	// known is closed once it was asked for. What follows does not change then.
	known    chan struct{}
	err      error
	rq       api.Request
	accounts []string
	rate     *rate.Limiter

	// Guarded by the session's mu: how many of its requests are under way, and
	// whether the name is gone.
	busy int
	gone bool
}

// match is the rule for the signal that comes when a name changes its owner.
func match(name string) string {
	return "type='signal',sender='" + busName + "',interface='" + busName + "',member='NameOwnerChanged',arg0='" + name + "'"
}

// credentials are what the bus knows of a name from the kernel (SO_PEERCRED), in
// the bus's own namespaces.
type credentials struct {
	pid, uid uint32
}

var errNoCredentials = errors.New("the bus does not know the process behind the name")

func (c *conn) credentials(ctx context.Context, name string) (credentials, error) {
	r, err := c.callString(ctx, "GetConnectionCredentials", name)
	if err != nil {
		return credentials{}, err
	}
	if r.sig != "a{sv}" {
		return credentials{}, errNoCredentials
	}
	var got credentials
	var pid, uid bool
	r.Array(8, func() {
		key, sig := r.String(), r.VariantSignature()
		switch {
		case key == "ProcessID" && sig == "u":
			got.pid, pid = r.Uint32(), true
		case key == "UnixUserID" && sig == "u":
			got.uid, uid = r.Uint32(), true
		default:
			r.Skip(sig)
		}
	})
	if err := r.Close(); err != nil {
		return credentials{}, err
	}
	if !pid || !uid || got.pid == 0 || int32(got.pid) < 0 {
		return credentials{}, errNoCredentials
	}
	return got, nil
}

// checkNamespaces returns an error unless the numbers that the bus tells are those
// of this process's own pid and user namespace. It is asked for this process
// itself, and for itself.
func (c *conn) checkNamespaces(ctx context.Context) error {
	const elsewhere = "the bus is of another container: its process and user numbers are not this one's (hint: use the bus of the container that this process is in)"
	pid, err := c.listener()
	if err != nil {
		return err
	}
	own, err := c.credentials(ctx, c.name)
	if err != nil && !errors.Is(err, errNoCredentials) {
		return fmt.Errorf("ask the bus for this process: %w", err)
	}
	if err != nil || pid == 0 || own.pid != uint32(os.Getpid()) || own.uid != uint32(os.Geteuid()) {
		return errors.New(elsewhere)
	}
	daemon, err := c.credentials(ctx, busName)
	if err != nil {
		return fmt.Errorf("ask the bus for itself: %w", err)
	}
	for _, ns := range []string{"user", "pid"} {
		var ours, its unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+ns, &ours); err != nil {
			return os.NewSyscallError("stat", err)
		}
		if err := unix.Stat("/proc/"+strconv.Itoa(int(daemon.pid))+"/ns/"+ns, &its); err != nil {
			return fmt.Errorf("look at the namespaces of the bus's process: %w", err)
		}
		if ours.Dev != its.Dev || ours.Ino != its.Ino {
			return errors.New(elsewhere)
		}
	}
	return nil
}

var errGone = errors.New("the process behind the name has ended")

// open establishes who has a name: the process that connected to the bus, as it is
// now. The bus knows it by its number alone, so it is believed once the process is
// held and the name, with that number, is still there; and the user that it
// connected as must be among its own.
func (s *session) open(ctx context.Context, name string) (rq api.Request, err error) {
	got, err := s.conn.credentials(ctx, name)
	if err != nil {
		return rq, err
	}
	pidfd, err := unix.PidfdOpen(int(got.pid), 0)
	if err != nil {
		return rq, os.NewSyscallError("pidfd_open", err)
	}
	again, err := s.conn.credentials(ctx, name)
	if err == nil && again != got {
		err = errGone
	}
	var gid uint32
	if err == nil {
		gid, err = groupOf(got)
	}
	if err == nil && ended(pidfd) {
		err = errGone // and what was read may be of another
	}
	if err != nil {
		_ = unix.Close(pidfd)
		return rq, err
	}
	cred := api.Cred{PID: int32(got.pid), UID: got.uid, GID: gid}
	peer, err := s.Backend.Open(cred, pidfd)
	return api.Request{Peer: peer, Opener: cred, Sender: cred}, err
}

// ended reports whether the process has ended.
func ended(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return err != nil || n > 0
		}
	}
}

// groupOf returns the effective group of a process, which must have the user among
// its users (proc_pid_status(5)).
func groupOf(c credentials) (gid uint32, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(int(c.pid)) + "/status")
	if err != nil {
		return 0, err
	}
	users, groups := ids(b, "Uid:"), ids(b, "Gid:")
	if users == nil || groups == nil {
		return 0, errors.New("malformed file of /proc")
	}
	if !slices.Contains(users, c.uid) {
		return 0, fmt.Errorf("the process has not the user %d with which it connected", c.uid)
	}
	return groups[1], nil
}

// ids returns the real, effective, saved and file system id in the line that starts
// with the key, or nil. The name of the program, which its owner chooses, forges
// none: the kernel escapes newlines in it.
func ids(status []byte, key string) []uint32 {
	for line := range bytes.Lines(status) {
		rest, ok := bytes.CutPrefix(line, []byte(key))
		if !ok {
			continue
		}
		var all []uint32
		for f := range bytes.FieldsSeq(rest) {
			id, err := strconv.ParseUint(string(f), 10, 32)
			if err != nil {
				return nil
			}
			all = append(all, uint32(id))
		}
		if len(all) == 4 {
			return all
		}
	}
	return nil
}
