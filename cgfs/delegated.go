package cgfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// Delegated reports whether systemd has marked d as given away, with all below
// it (systemd.resource-control(5), Delegate=). Of its two marks the second is for
// those that may not see the first, and anybody who may write to d can set it.
func (d *Dir) Delegated() (bool, error) {
	for _, name := range []string{"trusted.delegate", "user.delegate"} {
		var buf [8]byte
		n, err := unix.Fgetxattr(d.fd, name, buf[:])
		switch {
		case err == unix.ENODATA, err == unix.EOPNOTSUPP: // v1 has no user.*
		case err != nil && err != unix.ERANGE:
			return false, &os.PathError{Op: "read " + name, Path: d.path, Err: err}
		case err == nil && string(buf[:n]) == "1":
			return true, nil
		}
	}
	return false, nil
}
