package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// request is one row's kind of request: calls that each connection repeats.
type request struct {
	name  string
	calls [][]byte // encoded; the serial is filled in
	// perConn returns the calls where they differ between connections.
	perConn func(conn int, victim *os.Process) [][]byte
	// reconnect says that every call comes on a new connection.
	reconnect bool
	// pipelined says that the handshake is sent with the first call.
	pipelined bool
	// victim says that every connection needs a process of its own.
	victim    bool
	floorName string
	// floor measures what the kernel alone takes per call, in µs of processor
	// time, beside the echo of a message of the same length.
	floor floorFunc
}

// requests returns the rows. Their cgroups are below the client's own.
func requests(cg *cgroup) []*request {
	ping := [][]byte{call("Ping", int32(0))}
	return []*request{
		{name: "Ping", floorName: "echo", calls: ping},
		{
			name: "GetValue", floorName: "echo + open, read, close", floor: floorRead,
			calls: [][]byte{call("GetValue", cg.controller, "x", cg.key)},
		},
		{
			name: "Create, Remove", floorName: "echo + mkdir or rmdir", floor: floorMkdir,
			calls: [][]byte{call("Create", cg.controller, "c-0"), call("Remove", cg.controller, "c-0", int32(0))},
			perConn: func(n int, _ *os.Process) [][]byte {
				name := "c-" + strconv.Itoa(n)
				return [][]byte{call("Create", cg.controller, name), call("Remove", cg.controller, name, int32(0))}
			},
		},
		{
			name: "MovePid", floorName: "echo + open, write, close", floor: floorMove, victim: true,
			calls: [][]byte{call("MovePid", cg.controller, "a", int32(1))},
			perConn: func(_ int, v *os.Process) [][]byte {
				return [][]byte{call("MovePid", cg.controller, "a", int32(v.Pid)), call("MovePid", cg.controller, "b", int32(v.Pid))}
			},
		},
		{
			name: "MakeThreadRealtime", floorName: "echo + sched_setattr", floor: floorRealtime, victim: true,
			calls: [][]byte{makeRealtime(1)},
			perConn: func(_ int, v *os.Process) [][]byte {
				return [][]byte{makeRealtime(v.Pid)}
			},
		},
		{name: "connect, log in, Ping", floorName: "connect, echo", calls: ping, reconnect: true},
		{name: "the same in one write", floorName: "connect, echo", calls: ping, reconnect: true, pipelined: true},
	}
}

// makeRealtime is what rtkit's clients ask for.
func makeRealtime(pid int) []byte {
	return callAt(api.RealtimePath, api.RealtimeInterface, "MakeThreadRealtimeWithPID", uint64(pid), uint64(pid), uint32(realtimePriority))
}

// call encodes a call of the original's interface.
func call(method string, args ...any) []byte {
	return callAt(api.ObjectPath, api.Interface0, method, args...)
}

func callAt(path dbus.ObjectPath, iface, method string, args ...any) []byte {
	m := &dbus.Message{
		Type: dbus.TypeMethodCall,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath:      dbus.MakeVariant(path),
			dbus.FieldInterface: dbus.MakeVariant(iface),
			dbus.FieldMember:    dbus.MakeVariant(method),
			dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(args...)),
		},
		Body: args,
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, binary.LittleEndian); err != nil {
		panic(err) // the arguments above
	}
	return b.Bytes()
}

// victims are processes to be moved, one for each connection.
type victims []*os.Process

func (r *request) spawn(ctx context.Context, n int) (vs victims, err error) {
	if !r.victim {
		return nil, nil
	}
	for range n {
		cmd := exec.CommandContext(ctx, "sleep", "600")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			vs.end()
			return nil, err
		}
		vs = append(vs, cmd.Process)
		// Without it nobody gets realtime.
		limit := unix.Rlimit{Cur: 200_000, Max: 200_000}
		if err := unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_RTTIME, &limit, nil); err != nil {
			vs.end()
			return nil, os.NewSyscallError("prlimit", err)
		}
	}
	return vs, nil
}

func (vs victims) end() {
	for _, v := range vs {
		_ = v.Kill()
		_, _ = v.Wait()
	}
}
