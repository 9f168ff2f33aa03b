package proxy

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// handle is a process that was named to the proxy, held by a pidfd.
type handle struct {
	cred  api.Cred
	pidfd int
}

var errGone = errors.New("the process has ended")

// hold returns a handle on the process. pidfd is one that is there already, or
// -1; hold owns it.
func hold(cred api.Cred, pidfd int) (*handle, error) {
	if pidfd < 0 {
		var err error
		if pidfd, err = unix.PidfdOpen(int(cred.PID), 0); err != nil {
			return nil, os.NewSyscallError("pidfd_open", err)
		}
	}
	h := &handle{cred: cred, pidfd: pidfd}
	if !h.alive() {
		h.close()
		return nil, errGone
	}
	return h, nil
}

// alive reports whether the process has not ended: its number is its own.
func (h *handle) alive() bool {
	p := []unix.PollFd{{Fd: int32(h.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && n == 0
	}
}

func (h *handle) close() { _ = unix.Close(h.pidfd) }

// facts are what the proxy itself needs to know of a client, as seen from the
// proxy's own namespaces.
type facts struct {
	// samePIDs and sameUsers: the client's pid and user namespace is the
	// proxy's, so that numbers mean the same in both.
	samePIDs, sameUsers bool
	// uids and gids translate the client's ids, where sameUsers is not set.
	uids, gids idMap
	// around names the namespaces around the client up to the proxy's.
	around []string
}

// learn reads the facts about a process. They count only if it is alive
// afterwards.
func learn(h *handle) (facts, error) {
	dir := "/proc/" + strconv.Itoa(int(h.cred.PID))
	var f facts
	users, err := namespaces(dir, "user")
	if err != nil {
		return f, err
	}
	pids, err := namespaces(dir, "pid")
	if err != nil {
		return f, err
	}
	f.sameUsers, f.samePIDs = len(users) == 0, len(pids) == 0
	f.around = append(users, pids...)
	if !f.sameUsers {
		if f.uids, err = readIDMap(dir + "/uid_map"); err != nil {
			return f, err
		}
		if f.gids, err = readIDMap(dir + "/gid_map"); err != nil {
			return f, err
		}
	}
	if !h.alive() {
		return f, errGone
	}
	return f, nil
}

// maxNesting bounds the walk outwards: the kernel nests user and pid namespaces
// 32 deep.
const maxNesting = 32

// namespaces returns the names of a process's namespaces of a kind, from its own
// outwards to, not including, the proxy's own. One that does not lie within the
// proxy's ends the walk where the kernel does not show what is around it.
func namespaces(dir, kind string) ([]string, error) {
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/"+kind, &own); err != nil {
		return nil, &os.PathError{Op: "stat", Path: "own namespace", Err: err}
	}
	fd, err := unix.Open(dir+"/ns/"+kind, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return []string{kind + " unknown"}, nil // more privileged than the proxy
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir + "/ns/" + kind, Err: err}
	}
	var names []string
	for {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		if err != nil || st.Dev == own.Dev && st.Ino == own.Ino || len(names) > maxNesting {
			_ = unix.Close(fd)
			return names, os.NewSyscallError("fstat", err)
		}
		names = append(names, kind+" "+strconv.FormatUint(st.Ino, 10))
		parent, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		_ = unix.Close(fd)
		if err != nil {
			return names, nil //nolint:nilerr // EPERM: it is outside of the proxy's
		}
		unix.CloseOnExec(parent)
		fd = parent
	}
}

func readIDMap(path string) (idMap, error) {
	b, err := os.ReadFile(path) //nolint:forbidigo // The kernel's own path.
	if err != nil {
		return nil, err
	}
	return parseIDMap(string(b))
}
