package wire

import (
	"encoding/binary"
	"errors"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// controlSize holds all that the kernel can pass with one recvmsg on a socket
// with SO_PASSCRED: a credential and MaxFDs descriptors (cmsg(3)). What does
// not fit is dropped inside recvmsg, which can block.
const controlSize = 2048

// ErrControl says that control messages were cut short or not of the form
// that the kernel makes.
var ErrControl = errors.New("malformed control message")

// Receiver receives bytes with what comes beside them. It is a buffer, to be
// used by one goroutine at a time.
type Receiver struct {
	control [controlSize]byte
	fds     [MaxFDs]int
}

// Received is what one recvmsg brought. The caller closes the FDs, whatever
// error came with them; the slice is good until the next Recv.
type Received struct {
	N    int
	Cred api.Cred
	FDs  []int
}

// Recv receives into b from a socket with SO_PASSCRED, without waiting. At end
// of file N is 0, with a credential that means nothing: {0, 0, 0}, not root.
// It returns EAGAIN where there is nothing to receive, and ErrControl where
// the connection must end.
func (r *Receiver) Recv(fd int, b []byte) (Received, error) {
	n, control, flags, err := recvmsg(fd, b, r.control[:], 0)
	if err != nil {
		return Received{}, err
	}
	got := Received{N: n}
	var creds int
	got.Cred, creds, got.FDs, err = parseControl(r.control[:control], r.fds[:0])
	if err == nil && (flags&unix.MSG_CTRUNC != 0 || n > 0 && creds != 1) {
		err = ErrControl
	}
	return got, err
}

// Peek looks at what the next Recv into b would bring: how many bytes, and
// whether descriptors come with them. It takes none, because it has no room for
// them. A Recv of that many bytes brings no more descriptors than that.
func Peek(fd int, b []byte) (n int, fds bool, err error) {
	var cred [32]byte // CMSG_SPACE of the credential alone
	n, _, flags, err := recvmsg(fd, b, cred[:], unix.MSG_PEEK)
	return n, flags&unix.MSG_CTRUNC != 0, err
}

// parseControl reads a control buffer. It returns every descriptor it finds,
// also where the buffer is malformed.
func parseControl(b []byte, fds []int) (cred api.Cred, creds int, _ []int, err error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofCmsghdr {
			return cred, creds, fds, ErrControl
		}
		size := binary.NativeEndian.Uint64(b)
		level := int32(binary.NativeEndian.Uint32(b[8:]))
		kind := int32(binary.NativeEndian.Uint32(b[12:]))
		if size < unix.SizeofCmsghdr || size > uint64(len(b)) {
			return cred, creds, fds, ErrControl
		}
		data := b[unix.SizeofCmsghdr:size]
		switch {
		case level == unix.SOL_SOCKET && kind == unix.SCM_CREDENTIALS && len(data) == unix.SizeofUcred:
			creds++
			cred.PID = int32(binary.NativeEndian.Uint32(data))
			cred.UID = binary.NativeEndian.Uint32(data[4:])
			cred.GID = binary.NativeEndian.Uint32(data[8:])
		case level == unix.SOL_SOCKET && kind == unix.SCM_RIGHTS:
			for ; len(data) >= 4; data = data[4:] {
				fds = append(fds, int(int32(binary.NativeEndian.Uint32(data))))
			}
		default:
			err = ErrControl
		}
		next := align(int(size), 8)
		if next >= len(b) {
			break
		}
		b = b[next:]
	}
	return cred, creds, fds, err
}

func recvmsg(fd int, b, control []byte, flags int) (n, controlLen, msgFlags int, err error) {
	iov := unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: unsafe.SliceData(control), Controllen: uint64(len(control))}
	flags |= unix.MSG_DONTWAIT | unix.MSG_CMSG_CLOEXEC
	for {
		// Raw: it does not wait, so the scheduler need not know.
		r, _, e := syscall.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), uintptr(flags))
		switch e {
		case 0:
			return int(r), int(msg.Controllen), int(msg.Flags), nil
		case unix.EINTR:
			continue
		}
		return 0, 0, 0, e
	}
}

// Send sends b without waiting and returns how many bytes went.
func Send(fd int, b []byte) (int, error) {
	for {
		r, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))),
			uintptr(len(b)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
			continue
		}
		return 0, e
	}
}

// SendAs sends b without waiting, with the credential of another process in
// the sender's own numbers, which the kernel translates for the receiver, and
// returns how many bytes went. An empty b is an empty datagram, and nothing on
// a stream. The error is ESRCH if there is no such process.
func SendAs(fd int, b []byte, cred api.Cred) (int, error) {
	var control [unix.SizeofCmsghdr + 16]byte // CMSG_SPACE of a struct ucred
	binary.NativeEndian.PutUint64(control[0:], unix.SizeofCmsghdr+unix.SizeofUcred)
	binary.NativeEndian.PutUint32(control[8:], unix.SOL_SOCKET)
	binary.NativeEndian.PutUint32(control[12:], unix.SCM_CREDENTIALS)
	binary.NativeEndian.PutUint32(control[16:], uint32(cred.PID))
	binary.NativeEndian.PutUint32(control[20:], cred.UID)
	binary.NativeEndian.PutUint32(control[24:], cred.GID)
	iov := unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: &control[0], Controllen: uint64(len(control))}
	for {
		r, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
			continue
		}
		return 0, e
	}
}
