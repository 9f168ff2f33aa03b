package cgfs

import "errors"

// Errors of this package, to be found with errors.Is. What the kernel refuses
// comes as *os.PathError with the name as the caller wrote it.
var (
	// ErrNoController: no hierarchy that is open has the controller.
	ErrNoController = errors.New("no such controller")
	// ErrUnsupported: the hierarchy's version, or this kernel, cannot do it.
	ErrUnsupported = errors.New("not supported on this host")
	// ErrValue: the value of a key is malformed or out of range.
	ErrValue = errors.New("invalid value")
	// ErrName: the name of a cgroup or control file is malformed.
	ErrName = errors.New("invalid name")
	// ErrTooBig: a bound of this package is exceeded.
	ErrTooBig = errors.New("too big")
)
