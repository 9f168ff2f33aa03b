package manager

import (
	"errors"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
)

// kernel turns an error from below into one for the requestor: what was tried
// in its own words, and the kernel's reason.
func (c *call) kernel(subject string, err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	kind, reason := classify(err)
	if kind == api.Internal {
		c.failed(subject, err)
	}
	return &api.Error{Kind: kind, Text: c.op + " " + subject + ": " + reason, Cause: err}
}

// failed writes down what the requestor is not told.
func (c *call) failed(subject string, err error) {
	c.m.log.WithFields(logrus.Fields{"op": c.op, "target": subject}).WithError(err).Error("failed")
}

// classify maps what the kernel and cgfs say to a kind and words.
func classify(err error) (api.Kind, string) {
	var errno unix.Errno
	switch {
	case errors.Is(err, identity.ErrGone):
		return api.NotFound, "no such task"
	case errors.Is(err, cgfs.ErrNoController):
		return api.NotFound, detail(err, "no such controller on this host")
	case errors.Is(err, cgfs.ErrUnsupported):
		return api.Unsupported, detail(err, "not supported on this host")
	case errors.Is(err, cgfs.ErrValue):
		return api.Invalid, detail(err, "invalid value")
	case errors.Is(err, cgfs.ErrName):
		return api.Invalid, detail(err, "invalid name")
	case errors.Is(err, cgfs.ErrTooBig):
		return api.Limit, "the content is too big"
	case errors.As(err, &errno):
		return classifyErrno(errno)
	}
	return api.Internal, "internal error; the daemon's log says more"
}

// detail returns the text of an error of cgfs's own, which speaks of the
// caller's words alone.
func detail(err error, otherwise string) string {
	if _, ok := errors.AsType[unix.Errno](err); ok {
		return otherwise
	}
	return err.Error()
}

func classifyErrno(errno unix.Errno) (api.Kind, string) {
	switch errno {
	case unix.ENOENT, unix.ENODEV, unix.ENOTDIR:
		return api.NotFound, "no such cgroup or file"
	case unix.ESRCH:
		return api.NotFound, "no such task"
	case unix.EEXIST:
		return api.Exists, "it exists already"
	case unix.EBUSY, unix.ENOTEMPTY:
		return api.Busy, "it is in use (tasks or cgroups are left in it, or the kernel refuses for now)"
	case unix.EAGAIN:
		return api.Busy, "the kernel could not do it right now"
	case unix.EACCES, unix.EPERM, unix.EROFS:
		return api.Denied, "the kernel refuses"
	case unix.EINVAL, unix.ERANGE, unix.EOVERFLOW, unix.ENXIO, unix.EIO, unix.ELOOP, unix.EXDEV, unix.ENAMETOOLONG, unix.E2BIG:
		return api.Invalid, "the kernel refuses: " + errno.Error()
	case unix.ENOSPC:
		return api.Limit, "nothing is left to take it from (parent cgroup empty of cpus or memory nodes, or a kernel limit)"
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return api.Unsupported, "the kernel does not support it here"
	case unix.ENOMEM, unix.ENFILE, unix.EMFILE:
		return api.Limit, "out of resources"
	}
	return api.Internal, "internal error; the daemon's log says more"
}
