package identity

import (
	"bytes"
	"errors"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"cgmanager/privcheck"
)

var errMalformed = errors.New("malformed file of /proc")

// Status is what is needed of a /proc/PID/status (proc_pid_status(5)), in the
// numbers of whoever opened it.
type Status struct {
	// UIDs and GIDs are the real, effective, saved and filesystem ids.
	UIDs, GIDs [4]uint32
	Tgid       int32
	// CapEff is the effective capability set.
	CapEff uint64
	// NSpid holds the pids from the reader's pid namespace inwards.
	NSpid []int32
}

// SysAdmin reports whether CAP_SYS_ADMIN is effective.
func (s *Status) SysAdmin() bool { return s.CapEff&(1<<unix.CAP_SYS_ADMIN) != 0 }

// ParseStatus parses a /proc/PID/status. The lines it looks for must all be
// there; the name of the program, which its owner chooses, cannot forge one,
// because the kernel escapes newlines in it.
func ParseStatus(b []byte) (Status, error) {
	var s Status
	seen := 0
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(bytes.TrimRight(line, "\n"), []byte(":"))
		if !ok {
			continue
		}
		var err error
		switch string(name) {
		case "Tgid":
			var v uint64
			v, err = strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 31)
			s.Tgid = int32(v)
		case "Uid":
			s.UIDs, err = fourIDs(rest)
		case "Gid":
			s.GIDs, err = fourIDs(rest)
		case "CapEff":
			s.CapEff, err = strconv.ParseUint(string(bytes.TrimSpace(rest)), 16, 64)
		case "NSpid":
			for f := range bytes.FieldsSeq(rest) {
				v, e := strconv.ParseUint(string(f), 10, 31)
				if e != nil {
					err = e
					break
				}
				s.NSpid = append(s.NSpid, int32(v))
			}
		default:
			continue
		}
		if err != nil {
			return Status{}, errMalformed
		}
		seen++
	}
	if seen != 5 || len(s.NSpid) == 0 {
		return Status{}, errMalformed
	}
	if s.Tgid == 0 { // reaped since the file was opened
		return Status{}, ErrGone
	}
	return s, nil
}

func fourIDs(b []byte) ([4]uint32, error) {
	var ids [4]uint32
	i := 0
	for f := range bytes.FieldsSeq(b) {
		v, err := strconv.ParseUint(string(f), 10, 32)
		if err != nil || i == len(ids) {
			return ids, errMalformed
		}
		ids[i] = uint32(v)
		i++
	}
	if i != len(ids) {
		return ids, errMalformed
	}
	return ids, nil
}

// ParseIDMap parses a /proc/PID/uid_map or gid_map (user_namespaces(7)). An
// empty one is a namespace without a map.
func ParseIDMap(b []byte) (privcheck.IDMap, error) {
	var m privcheck.IDMap
	for line := range bytes.Lines(b) {
		var v [3]uint32
		i := 0
		for f := range bytes.FieldsSeq(line) {
			n, err := strconv.ParseUint(string(f), 10, 32)
			if err != nil || i == len(v) {
				return nil, errMalformed
			}
			v[i] = uint32(n)
			i++
		}
		if i != len(v) || v[2] == 0 {
			return nil, errMalformed
		}
		m = append(m, privcheck.IDRange{Inside: v[0], Outside: v[1], Count: v[2]})
	}
	return m, nil
}

// Status reads the process's status.
func (p *Process) Status() (Status, error) {
	b, err := p.read("status")
	if err != nil {
		return Status{}, err
	}
	return ParseStatus(b)
}

// credentials are the real, effective, saved and filesystem ids of a process's
// leader.
type credentials struct{ uids, gids [4]uint32 }

// hasIDs reports whether uid and gid are among them.
func (c *credentials) hasIDs(uid, gid uint32) bool {
	return slices.Contains(c.uids[:], uid) && slices.Contains(c.gids[:], gid)
}

// credentials reads the leader's ids, by one system call where the kernel has
// it (PIDFD_GET_INFO, Linux 6.13).
func (p *Process) credentials() (credentials, error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CREDS}
	err := unix.IoctlPidfdInfo(p.pidfd, &info)
	if err == nil && info.Mask&unix.PIDFD_INFO_CREDS != 0 {
		return credentials{
			uids: [4]uint32{info.Ruid, info.Euid, info.Suid, info.Fsuid},
			gids: [4]uint32{info.Rgid, info.Egid, info.Sgid, info.Fsgid},
		}, nil
	}
	if errors.Is(err, unix.ESRCH) {
		return credentials{}, ErrGone
	}
	st, err := p.Status()
	return credentials{uids: st.UIDs, gids: st.GIDs}, err
}

// sysAdmin reports whether CAP_SYS_ADMIN is effective. capget(2) says the same
// as the status file for a fraction of its price. It takes a number, but like
// everything here it counts only if the process is alive afterwards, and as
// long as it is, the number is its own.
func (p *Process) sysAdmin() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3, Pid: p.pid}
	var data [2]unix.CapUserData // of 32 capabilities each
	switch err := unix.Capget(&header, &data[0]); {
	case err == nil:
		return data[unix.CAP_SYS_ADMIN/32].Effective&(1<<(unix.CAP_SYS_ADMIN%32)) != 0, nil
	case errors.Is(err, unix.ESRCH):
		return false, ErrGone
	}
	st, err := p.Status()
	return st.SysAdmin(), err
}
