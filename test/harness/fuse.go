package harness

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ServeStuckFUSE serves a file system in user space from /dev/fuse, which must not
// block, until it is gone; then it closes that, which ends all that waits. It answers
// what it takes to open its one file, whatever the name, and never FLUSH: close(2) of
// that file waits for ever.
func ServeStuckFUSE(dev int, gone *atomic.Bool) {
	defer unix.Close(dev)
	for buf := make([]byte, 1<<17); !gone.Load(); {
		p := []unix.PollFd{{Fd: int32(dev), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 20); n == 0 || err != nil {
			continue
		}
		if n, err := Read(dev, buf); err == nil && n >= 40 {
			if answer := answerFUSE(buf[:n]); answer != nil {
				_, _ = Write(dev, answer)
			}
		}
	}
}

// answerFUSE answers a request (linux/fuse.h), or returns nil.
func answerFUSE(rq []byte) []byte {
	const (
		lookup, forget, getattr, open, release, flush, initialize = 1, 2, 3, 14, 18, 25, 26
		dirMode, fileMode                                         = unix.S_IFDIR | 0o755, unix.S_IFREG | 0o666
	)
	order := binary.NativeEndian
	attr := func(ino uint64, mode uint32) []byte {
		b := make([]byte, 88)
		order.PutUint64(b, ino)
		order.PutUint32(b[60:], mode)
		order.PutUint32(b[64:], 1)
		return b
	}
	var body []byte
	var code int32
	switch order.Uint32(rq[4:]) {
	case initialize:
		body = make([]byte, 64)
		order.PutUint32(body, 7)
		order.PutUint32(body[4:], 31)
		order.PutUint32(body[20:], 4096)
	case lookup:
		body = make([]byte, 40, 128)
		order.PutUint64(body, 2)
		body = append(body, attr(2, fileMode)...)
	case getattr:
		body = append(make([]byte, 16, 104), attr(1, dirMode)...)
		if order.Uint64(rq[16:]) == 2 {
			body = append(body[:16], attr(2, fileMode)...)
		}
	case open:
		body = make([]byte, 16)
	case release:
	case flush, forget:
		return nil
	default:
		code = -int32(unix.ENOSYS)
	}
	head := make([]byte, 16, 16+len(body))
	order.PutUint32(head, uint32(16+len(body)))
	order.PutUint32(head[4:], uint32(code))
	copy(head[8:], rq[8:16])
	return append(head, body...)
}
