package server

import (
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// What a message costs before anybody is asked: its header and arguments.
func BenchmarkDecode(b *testing.B) {
	methods := newMethodTable()
	msg := (&client{}).encode(to(api.Interface0, "GetValue", "memory", "lxc/web", "memory.limit_in_bytes"))
	b.ReportAllocs()
	for b.Loop() {
		var m wire.Message
		if err := m.Decode(msg); err != nil {
			b.Fatal(err)
		}
		var a args
		if err := a.decode(methods.find(&m), &m); err != nil {
			b.Fatal(err)
		}
	}
}

// A request and its answer over a socket: Ping is answered by the event loop,
// GetValue0 by a worker (with a backend that does nothing).
func BenchmarkRequest(b *testing.B) {
	for name, m := range map[string]call{
		"loop":   ping(),
		"worker": to(api.Interface0, "GetValue", "memory", "x", "k"),
	} {
		b.Run(name, func(b *testing.B) {
			ts := serve(b, &fakeBackend{}, Limits{})
			c := ts.login()
			msg := c.encode(m)
			answer := make([]byte, 256)
			b.ReportAllocs()
			for b.Loop() {
				c.write(msg)
				if n, err := retry(func() (int, error) { return unix.Read(c.fd, answer) }); err != nil || n < 24 {
					b.Fatal(n, err)
				}
			}
		})
	}
}
