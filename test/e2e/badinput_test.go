package e2e_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// siege is a daemon that one attacks while others must be served: host root,
// and users whose cgroups and accounts are their own.
type siege struct {
	*world
	fds, threads int
	stop         chan struct{}
	wait         sync.WaitGroup
}

// patience is how long any request of an honest client may take meanwhile: a
// second, and more where the machine is busy with other things.
func patience() time.Duration { return cgtest.Patience(time.Second) }

func newSiege(t *testing.T) *siege {
	t.Helper()
	s := &siege{world: newWorld(t), stop: make(chan struct{})}
	yard := harness.NewTree(t) // not in the picture of what an attack changed
	var there sync.WaitGroup
	for _, uid := range []uint32{0, 2000} {
		cg := fmt.Sprint("witness", uid)
		yard.Make(cg, uid, uid)
		yard.Make(cg+"/sub", uid, uid)
		p := harness.Start(t, harness.Spec{UID: uid, GID: uid})
		yard.Place(p, cg)
		there.Add(1)
		s.wait.Go(func() { s.witness(p, there.Done) })
	}
	// What the daemon holds for the witnesses is no attack's doing.
	there.Wait()
	s.fds, s.threads = s.settled(), s.threadCount()
	t.Cleanup(func() {
		close(s.stop)
		s.wait.Wait()
		if hwm := s.status("VmHWM"); hwm > 64<<10 {
			t.Errorf("the daemon once had %d KiB in memory", hwm)
		}
	})
	return s
}

// witness asks all the time, also on new connections, until the end of the
// siege. It calls there once it has asked for everything, or cannot.
func (s *siege) witness(p *harness.Proc, there func()) {
	there = sync.OnceFunc(there)
	defer there()
	c, err := p.Dial(s.d.Sock)
	if err != nil {
		s.Errorf("a witness cannot log in: %v", err)
		return
	}
	var worst time.Duration
	n := 0
	for ; ; n++ {
		if n == 4 {
			there()
		}
		select {
		case <-s.stop:
			c.Close()
			s.Logf("witness %d: %d requests, the slowest took %v", p.UID, n, worst)
			if n < 10 {
				s.Errorf("witness %d was not there", p.UID)
			}
			return
		case <-time.After(5 * time.Millisecond):
		}
		start := time.Now()
		what := "a new connection"
		switch n % 4 {
		case 0:
			var d *harness.Conn
			if d, err = p.Dial(s.d.Sock); err == nil {
				d.Close()
			}
		case 1:
			what = "GetValue"
			_, err = c.V0("GetValue", "memory", "sub", "memory.limit_in_bytes")
		case 2:
			what = "Create and Remove"
			if _, err = c.V0("Create", "freezer", "made"); err == nil {
				_, err = c.V0("Remove", "freezer", "made", int32(1))
			}
		case 3:
			what = "ListTasks"
			_, err = c.V1("ListTasks", "")
		}
		took := time.Since(start)
		worst = max(worst, took)
		if err != nil || took > patience() {
			s.Errorf("witness %d: %s took %v: %v", p.UID, what, took, err)
			if err != nil {
				return
			}
		}
	}
}

// settled waits until the number of the daemon's files changes only as the
// witnesses come and go.
func (s *siege) settled() int {
	n := 0
	for range 20 {
		n = max(n, s.d.FDs())
		time.Sleep(5 * time.Millisecond)
	}
	return n
}

// over fails the test unless all that the attack made the daemon hold is given
// back within the time.
func (s *siege) over(t *testing.T, within time.Duration) {
	t.Helper()
	deadline := time.Now().Add(within)
	n := s.d.FDs()
	for n > s.fds+4 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
		n = s.d.FDs()
	}
	if n > s.fds+4 {
		t.Errorf("%d files open after %v, %d before: %v", n, within, s.fds, s.d.Files())
	}
	if m := s.threadCount(); m > s.threads+16 {
		t.Errorf("%d threads, %d before", m, s.threads)
	}
	if !s.d.Alive() {
		t.Fatal("the daemon ended")
	}
}

func (s *siege) threadCount() int {
	s.Helper()
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.d.PID))
	if err != nil {
		s.Error(err)
	}
	return len(e)
}

// status returns a number of the daemon's /proc/PID/status.
func (s *siege) status(field string) int {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.d.PID))
	if err != nil {
		s.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				s.Error(err)
			}
			return n
		}
	}
	return 0
}

// badArgs are for bad: what to write, each on a connection of its own.
type badArgs struct {
	Sock   string
	Inputs []input
	// Shut ends the client's side after the input: there will be no more.
	Shut bool
}

// input is Data, and then Again so many times.
type input struct {
	Data, Again []byte
	Times       int
}

// times is how often something is repeated that shows at once in most cases.
func times(n int) int {
	if testing.Short() {
		return (n + 4) / 5
	}
	return n
}

func bytesOf(b []byte) input { return input{Data: b} }

// badResult is what an input was answered with.
type badResult struct {
	Got []byte
	// Closed: the daemon closed the connection.
	Closed bool
}

var bad = harness.Inside("bad input", func(a badArgs) ([]badResult, error) {
	var all []badResult
	buf := make([]byte, 64<<10)
	for i, in := range a.Inputs {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return nil, fmt.Errorf("input %d: %w", i, err)
		}
		var r badResult
		// It may be closed already, which is what comes out below.
		r.Got, _ = harness.Begin(fd, append(in.Data, bytes.Repeat(in.Again, in.Times)...))
		if a.Shut {
			_ = unix.Shutdown(fd, unix.SHUT_WR)
		}
		for !r.Closed && len(r.Got) < 1<<20 {
			n, err := harness.Read(fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			r.Closed = n <= 0 || errors.Is(err, unix.ECONNRESET)
			r.Got = append(r.Got, buf[:max(n, 0)]...)
		}
		unix.Close(fd)
		all = append(all, r)
	}
	return all, nil
})

// closes fails the test for every input after which the connection is open.
func (s *siege) closes(t *testing.T, p *harness.Proc, shut bool, inputs map[string]input) {
	t.Helper()
	for names := range slices.Chunk(slices.Sorted(maps.Keys(inputs)), 50) {
		a := badArgs{Sock: s.d.Sock, Shut: shut}
		for _, name := range names {
			a.Inputs = append(a.Inputs, inputs[name])
		}
		var got []badResult
		if err := p.Run(bad, a, &got); err != nil {
			t.Fatal(err)
		}
		for i, r := range got {
			if !r.Closed {
				t.Errorf("%s: the connection is still open; answered %.200q", names[i], r.Got)
			}
		}
	}
	s.over(t, 3*time.Second)
}

// attacker is root in a container of its own, in the cgroup "bad".
func (s *siege) attacker() *harness.Proc {
	s.Helper()
	return s.box("bad").Proc
}

// loggedIn is the login of a container's root, and what follows it.
func loggedIn(message []byte) input {
	return input{Data: append([]byte(login), message...)}
}

func TestKernelBadInputMessages(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	good := call(t, 1, harness.V0, "Create", "memory", "made")
	before := s.Snapshot()

	t.Run("truncated", func(t *testing.T) {
		inputs := map[string]input{}
		for n := range len(good) {
			inputs[fmt.Sprint(n, " bytes")] = loggedIn(good[:n])
		}
		for n := range len(login) - 1 {
			inputs[fmt.Sprint(n, " bytes of the login")] = bytesOf([]byte(login[:n]))
		}
		s.closes(t, p, true, inputs)
	})
	t.Run("oversized", func(t *testing.T) {
		inputs := map[string]input{}
		for _, size := range []uint32{64 << 10, 64<<10 + 1, 1 << 20, 128 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
			for name, at := range map[string]int{"body": 4, "fields": 12} {
				m := bytes.Clone(good)
				binary.LittleEndian.PutUint32(m[at:], size)
				inputs[fmt.Sprint(name, " of ", size)] = loggedIn(m)
				m = bytes.Clone(m)
				m[0] = 'B'
				binary.BigEndian.PutUint32(m[at:], size)
				inputs[fmt.Sprint("big endian ", name, " of ", size)] = loggedIn(m)
			}
		}
		big := bytes.Clone(good)
		binary.LittleEndian.PutUint32(big[4:], 64<<10)
		inputs["64 KiB and a head, all of it"] = input{append([]byte(login), big...), []byte("x"), 64 << 10}
		s.closes(t, p, false, inputs)
		if rss := s.status("VmRSS"); rss > 48<<10 {
			t.Errorf("the daemon has %d KiB in memory", rss)
		}
	})
	t.Run("malformed", func(t *testing.T) {
		inputs := map[string]input{}
		change := func(what string, at int, b ...byte) {
			m := bytes.Clone(good)
			copy(m[at:], b)
			inputs[what] = loggedIn(m)
		}
		change("no byte order", 0, 'x')
		change("NUL for a byte order", 0, 0)
		change("message type 0", 1, 0)
		change("protocol version 2", 3, 2)
		change("protocol version 0", 3, 0)
		change("serial 0", 8, 0, 0, 0, 0)
		change("a header field of another type", 17, 1, 'u', 0)
		change("a header field without a type", 17, 0, 0, 0)
		change("garbage", 0, bytes.Repeat([]byte{0xff}, 32)...)
		i := bytes.Index(good, []byte("memory\x00"))
		change("a string without its end", i+6, 'x')
		change("a NUL in a string", i+2, 0)
		change("not UTF-8", i, 0xff, 0xfe)
		change("a surrogate", i, 0xed, 0xa0, 0x80)
		change("a string longer than the body", i-4, 0xff, 0xff, 0, 0)
		change("a string of 4 GiB", i-4, 0xff, 0xff, 0xff, 0xff)
		change("a string shorter than it is", i-4, 2)
		for _, name := range []dbus.HeaderField{dbus.FieldPath, dbus.FieldMember} {
			h := fields(harness.V0, "Ping")
			delete(h, name)
			var b bytes.Buffer
			// The library refuses to write these; so does every honest one.
			m := message(t, binary.LittleEndian, 1, 0, fields(harness.V0, "Ping"), int32(0))
			b.Write(m)
			raw := b.Bytes()
			tag := map[dbus.HeaderField]string{dbus.FieldPath: "\x01\x01o", dbus.FieldMember: "\x03\x01s"}[name]
			at := bytes.Index(raw, []byte(tag))
			raw[at] = 10 // a field that nobody knows, which is passed over
			inputs[fmt.Sprintf("no header field %d", name)] = loggedIn(raw)
		}
		path := bytes.Index(good, []byte("/org/"))
		change("a path without a slash", path, 'x')
		change("a path with an empty part", path+5, '/', '/')
		change("a path that is not UTF-8", path+1, 0xff)
		member := bytes.Index(good, []byte("Create"))
		change("a member with a dot", member+1, '.')
		change("a member with a digit first", member, '1')
		sig := bytes.Index(good, []byte("\x02ss\x00"))
		change("a signature of another length", sig, 1)
		change("a signature of no type", sig+1, '!')
		change("an open struct", sig+1, '(', 's')
		change("an array of nothing", sig+1, 's', 'a')
		var variant []byte
		for range 100 {
			variant = append(variant, 1, 'v', 0)
		}
		variant = append(variant, 1, 'y', 0, 7)
		inputs["arrays in arrays"] = loggedIn(withBody(t, strings.Repeat("a", 33)+"s", make([]byte, 4)))
		inputs["structs in structs"] = loggedIn(withBody(t, strings.Repeat("(", 33)+"s"+strings.Repeat(")", 33), make([]byte, 8)))
		s.closes(t, p, false, inputs)
		// Not what Create takes, whatever is in it.
		s.closes(t, p, true, map[string]input{
			"variants in variants":   loggedIn(withBody(t, "v", variant)),
			"a signature of 255":     loggedIn(withBody(t, strings.Repeat("s", 255), nil)),
			"an array of 4 GiB":      loggedIn(withBody(t, "as", []byte{0xff, 0xff, 0xff, 0xff})),
			"an array beyond itself": loggedIn(withBody(t, "a{ss}", []byte{64, 0, 0, 0, 0, 0, 0, 0})),
		})
	})
	t.Run("mutated", func(t *testing.T) {
		// The same every time, and a thousand of them.
		r := rand.New(rand.NewPCG(1, 2))
		v1 := call(t, 2, harness.V1, "Create", "made", []string{"memory"}, map[string]string{"memory.limit": "5M"})
		inputs := map[string]input{}
		for i := range harness.Rounds(1000) {
			m := bytes.Clone([][]byte{good, v1}[i%2])
			for range 1 + r.IntN(4) {
				switch r.IntN(3) {
				case 0:
					m[r.IntN(len(m))] ^= 1 << r.IntN(8)
				case 1:
					m[r.IntN(len(m))] = byte(r.IntN(256))
				case 2:
					at := r.IntN(len(m))
					m = append(m[:at], m[min(len(m), at+1+r.IntN(8)):]...)
				}
				if len(m) == 0 {
					m = []byte{0}
				}
			}
			// What makes the message a name of its own is not of interest here.
			inputs[fmt.Sprint("mutant ", i)] = loggedIn(m)
		}
		s.closes(t, p, true, inputs)
		c := p.MustDial(s.d.Sock)
		defer c.Close()
		// Some are good requests. What they made is in the attacker's cgroup.
		r2, err := c.V1("ListChildren", "")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range r2[0].([]string) {
			if _, err := c.V1("Delete", name); err != nil {
				t.Errorf("Delete %q: %v", name, err)
			}
		}
	})
	if d := before.Diff(s.Snapshot()); len(d) > 0 {
		t.Errorf("changed:\n  %s", strings.Join(d, "\n  "))
	}
}

// withBody is a call of Create with a body that the library would not write.
func withBody(t *testing.T, signature string, body []byte) []byte {
	t.Helper()
	var m []byte
	m = append(m, 'l', 1, 0, 1)
	m = binary.LittleEndian.AppendUint32(m, uint32(len(body)))
	m = binary.LittleEndian.AppendUint32(m, 1)
	at := len(m)
	m = binary.LittleEndian.AppendUint32(m, 0)
	pad := func(n int) {
		for len(m)%n != 0 {
			m = append(m, 0)
		}
	}
	field := func(code byte, typ, val string) {
		pad(8)
		m = append(m, code, 1)
		m = append(m, typ...)
		m = append(m, 0)
		if typ == "g" {
			m = append(m, byte(len(val)))
		} else {
			pad(4)
			m = binary.LittleEndian.AppendUint32(m, uint32(len(val)))
		}
		m = append(append(m, val...), 0)
	}
	field(1, "o", objectPath)
	field(2, "s", harness.V0)
	field(3, "s", "Create")
	field(8, "g", signature)
	binary.LittleEndian.PutUint32(m[at:], uint32(len(m)-at-4))
	pad(8)
	return append(m, body...)
}

// Wrong types, and names that do not exist, are answered, and the connection
// goes on.
func TestKernelBadInputSignatures(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	r := dial(t, p, s.d.Sock)
	before := s.Snapshot()
	serial := uint32(0)
	ask := func(iface, member string, args ...any) (string, string) {
		t.Helper()
		serial++
		m := r.ask(message(t, binary.LittleEndian, serial, 0, fields(iface, member), args...))
		if m.Type != dbus.TypeError || len(m.Body) != 1 {
			t.Fatalf("%s.%s%v: %v", iface, member, args, m)
		}
		name, _ := m.Headers[dbus.FieldErrorName].Value().(string)
		return strings.TrimPrefix(name, "org.freedesktop.DBus.Error."), fmt.Sprint(m.Body[0])
	}
	for iface, members := range map[string][]string{
		harness.V0: {
			"Ping", "GetPidCgroup", "GetPidCgroupAbs", "MovePid", "MovePidAbs", "Create", "Chown", "Chmod", "GetValue", "SetValue",
			"Remove", "GetTasks", "GetTasksRecursive", "ListChildren", "RemoveOnEmpty", "Prune", "ListControllers", "ListKeys",
			"GetPidCgroupScm", "GetPidCgroupAbsScm", "MovePidScm", "MovePidAbsScm", "CreateScm", "ChownScm", "ChmodScm", "GetValueScm",
			"SetValueScm", "RemoveScm", "GetTasksScm", "GetTasksRecursiveScm", "ListChildrenScm", "RemoveOnEmptyScm", "PruneScm", "ListKeysScm",
		},
		harness.V1: {
			"ListControllers", "Create", "SetValue", "GetValue", "ListChildren", "ListTasks", "Chown", "Move", "MoveFd", "Delete", "DeleteForce", "Kill", "Delegate",
			"ListGrants", "Grant", "Revoke", "GrantLimits", "RevokeLimits",
		},
	} {
		for _, member := range members {
			for _, args := range [][]any{
				{byte(1)},
				{int64(1), "x"},
				{"x", "x", "x", "x", "x", "x"},
				{dbus.MakeVariant("memory"), "x"},
				{[]any{}},
				{3.5},
				{map[string]string{"a": "b"}},
				{struct{ A, B string }{"memory", "x"}},
				{true, true, true},
			} {
				name, text := ask(iface, member, args...)
				if name != "InvalidArgs" || text != "Invalid arguments to "+member+" method" {
					t.Errorf("%s%v: %s: %s", member, args, name, text)
				}
			}
		}
	}
	for _, iface := range []string{harness.V0, harness.V1, "no.such.Interface", "org.freedesktop.DBus"} {
		for _, member := range []string{"NoSuchMethod", "Borrow", "create", strings.Repeat("x", 255)} {
			if name, _ := ask(iface, member, "x"); name != "UnknownMethod" {
				t.Errorf("%s.%s: %s", iface, member, name)
			}
		}
	}
	if d := before.Diff(s.Snapshot()); len(d) > 0 {
		t.Errorf("changed:\n  %s", strings.Join(d, "\n  "))
	}
	if err := p.Send(r.fd, call(t, 9999, harness.V0, "Ping", int32(0)), nil); err != nil {
		t.Error(err)
	}
	r.more()
	p.Close(r.fd)
	s.over(t, 3*time.Second)
}

// Names, keys and values that no cgroup or file has: each is an error.
func TestKernelBadInputNames(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	c := p.MustDial(s.d.Sock)
	long := strings.Repeat("x", 256)
	// What a v2 cgroup gives to its children stays given, also by a request that
	// is refused: so that is done before.
	asker{t, c}.v1("Create", "first", []string{}, map[string]string{"memory.limit": "1M", "cpus_number": "1"})
	asker{t, c}.v1("Delete", "first")
	attacks := map[string]func() error{}
	for _, name := range []string{
		"..", "a/../b", "/..", "../bad", "a/..", ".", "a/./b", "\x01", "a\nb", "a\x7fb", "a\tb", long, "a/" + long,
		strings.Repeat("d/", 20) + "d", strings.Repeat("x/", 8000) + "x",
	} {
		short := fmt.Sprintf("%.20q… (%d bytes)", name, len(name))
		attacks["old Create "+short] = func() error { return second(c.V0("Create", "memory", name)) }
		attacks["CreateScm "+short] = func() error { return scm(c, "CreateScm", "memory", name) }
		attacks["Create "+short] = func() error { return second(c.V1("Create", name, []string{}, map[string]string{})) }
		attacks["SetValue "+short] = func() error { return second(c.V1("SetValue", name, map[string]string{"memory.limit": "1M"})) }
		attacks["Delegate "+short] = func() error { return second(c.V1("Delegate", name, []string{})) }
		attacks["Move "+short] = func() error { return second(c.V1("Move", name, uint32(p.PID))) }
	}
	for _, name := range []string{"/x", "x/", "a//b", "//"} {
		attacks["Create "+name] = func() error { return second(c.V1("Create", name, []string{}, map[string]string{})) }
	}
	many := map[string]string{}
	for i := range 1000 {
		many[fmt.Sprint("key", i)] = "1"
	}
	for what, values := range map[string]map[string]string{
		"no such key": {"no.such.key": "1"}, "no key": {"": "1"}, "no value": {"memory.limit": ""}, "a thousand keys": many,
		"a negative": {"memory.limit": "-5"}, "no number": {"memory.limit": "lots"}, "an overflow": {"memory.limit": "99999999999999999999T"},
		"a newline": {"memory.limit": "1M\n2M"}, "a control character": {"memory.limit": "1\x00M"[:1] + "\x01"},
		"a long value": {"memory.limit": strings.Repeat("9", 40000)},
		"a long key":   {strings.Repeat("k", 5000): "1"}, "infinity": {"cpus_number": "inf"}, "not a number": {"cpus_fraction": "NaN"},
	} {
		attacks["Create with "+what] = func() error { return second(c.V1("Create", "v", []string{}, values)) }
	}
	for _, list := range [][]string{{"nosuch"}, {""}, {"memory", "nosuch"}, {"memory,pids"}, {"all"}, make([]string, 5000)} {
		attacks[fmt.Sprintf("Delegate in %.40q", list)] = func() error { return second(c.V1("Delegate", "c", list)) }
		attacks[fmt.Sprintf("Create in %.40q", list)] = func() error { return second(c.V1("Create", "c", list, map[string]string{})) }
	}
	for _, ctrl := range []string{"", ",", "memory,", "nosuch", "memory,nosuch", "all,memory", strings.Repeat("memory,", 5000) + "nosuch", "../memory", "name="} {
		attacks[fmt.Sprintf("old Create in %.40q", ctrl)] = func() error { return second(c.V0("Create", ctrl, "c")) }
	}
	for _, pid := range []int32{0, -1, -2147483648, 2147483647} {
		attacks[fmt.Sprint("MovePid ", pid)] = func() error { return second(c.V0("MovePid", "memory", "", pid)) }
		attacks[fmt.Sprint("GetPidCgroup ", pid)] = func() error { return second(c.V0("GetPidCgroup", "memory", pid)) }
		attacks[fmt.Sprint("Move ", pid)] = func() error { return second(c.V1("Move", "", uint32(pid))) }
	}
	s.RefusedAll(t, attacks)
	c.Close()
	s.over(t, 3*time.Second)
}

// fdArgs are for passFDs.
type fdArgs struct {
	Sock string
	// Login is written before, without files.
	Login []byte
	Data  []byte
	// Files is how many go with Data, of Kind.
	Files int
	Kind  string
	Times int
	// Read waits for an answer before the connection is closed, ToEnd for its
	// end.
	Read, ToEnd bool
}

// strange makes files to pass: of all kinds, and such as are slow to close.
func strange(kind string) (fd int, keep func(), err error) {
	keep = func() {}
	switch kind {
	case "null":
		fd, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	case "dgram", "stream", "seqpacket":
		typ := map[string]int{"dgram": unix.SOCK_DGRAM, "stream": unix.SOCK_STREAM, "seqpacket": unix.SOCK_SEQPACKET}[kind]
		var p [2]int
		p, err = unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "listening":
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{}), unix.Listen(fd, 1))
		}
	case "epoll":
		fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	case "pipe":
		var p [2]int
		err = unix.Pipe2(p[:], unix.O_CLOEXEC)
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "eventfd":
		fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	case "pidfd":
		fd, err = unix.PidfdOpen(os.Getpid(), 0)
	case "directory":
		fd, err = unix.Open("/proc", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	case "path":
		fd, err = unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	case "udp":
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	case "full of itself":
		// A pair with a message in it that holds both ends: only the kernel's
		// garbage collector gets rid of that.
		var p [2]int
		if p, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = unix.Sendmsg(p[1], []byte{0}, unix.UnixRights(p[0], p[1]), nil, 0)
		}
		fd, keep = p[0], func() { unix.Close(p[1]) }
	case "lingering":
		var peer int
		fd, peer, err = lingering()
		held = append(held, peer) // its end would be the end of the lingering
	}
	if err != nil {
		return -1, keep, fmt.Errorf("%s: %w", kind, err)
	}
	return fd, keep, nil
}

// lingering returns a TCP socket whose close waits six seconds: its peer reads
// nothing, so there is unsent data.
func lingering() (fd, peer int, err error) {
	ln, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, err
	}
	defer unix.Close(ln)
	if err := errors.Join(
		unix.SetsockoptInt(ln, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096),
		unix.Bind(ln, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		unix.Listen(ln, 1),
	); err != nil {
		return -1, -1, err
	}
	addr, err := unix.Getsockname(ln)
	if err != nil {
		return -1, -1, err
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, -1, err
	}
	if err = unix.Connect(fd, addr); err != nil {
		return fd, -1, err
	}
	if peer, _, err = unix.Accept4(ln, unix.SOCK_CLOEXEC); err != nil {
		return fd, -1, err
	}
	if err = errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 6}),
		unix.SetNonblock(fd, true),
	); err != nil {
		return fd, peer, err
	}
	data := make([]byte, 64<<10)
	for range 1000 {
		if _, err := harness.Write(fd, data); errors.Is(err, unix.EAGAIN) {
			return fd, peer, nil
		} else if err != nil {
			return fd, peer, err
		}
	}
	return fd, peer, errors.New("the socket takes any amount of data")
}

// passFDs passes files with a message, on a new connection each time.
var passFDs = harness.Inside("pass files", func(a fdArgs) ([]badResult, error) {
	var all []badResult
	buf := make([]byte, 64<<10)
	for range max(a.Times, 1) {
		c, err := dialRaw(a.Sock)
		if err != nil {
			return nil, err
		}
		var fds []int
		var keeps []func()
		for range a.Files {
			fd, keep, err := strange(a.Kind)
			if err != nil {
				return nil, err
			}
			fds, keeps = append(fds, fd), append(keeps, keep)
		}
		var r badResult
		if len(a.Login) > 0 {
			if r.Got, err = harness.Login(c, a.Login); err != nil {
				return nil, err
			}
		}
		serr := unix.Sendmsg(c, a.Data, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		for _, fd := range fds {
			unix.Close(fd) // so that the daemon's copy is the last
		}
		if serr != nil && !errors.Is(serr, unix.EPIPE) {
			return nil, serr
		}
		for (a.Read || a.ToEnd) && !r.Closed {
			n, err := harness.Read(c, buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			r.Closed = n <= 0
			r.Got = append(r.Got, buf[:max(n, 0)]...)
			if !a.ToEnd && bytes.Contains(r.Got, []byte("AGREE_UNIX_FD\r\nl")) {
				break
			}
		}
		unix.Close(c)
		for _, keep := range keeps {
			keep()
		}
		all = append(all, r)
	}
	return all, nil
})

// announcing is a call that says how many files come with it.
func announcing(t *testing.T, files uint32, iface, member string, args ...any) []byte {
	t.Helper()
	h := fields(iface, member)
	h[dbus.FieldUnixFDs] = files
	return message(t, binary.LittleEndian, 1, 0, h, args...)
}

func TestKernelBadInputFiles(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	ping := call(t, 1, harness.V0, "Ping", int32(0))
	noFDs := strings.Replace(login, "NEGOTIATE_UNIX_FD\r\n", "", 1)
	for _, tc := range []struct {
		what string
		args fdArgs
		// closed: the connection ends. Else there is an error with this text.
		closed bool
		text   string
	}{
		{"253 files, none announced", fdArgs{Data: ping, Files: 253, Kind: "null"}, true, ""},
		{"one file, none announced", fdArgs{Data: ping, Files: 1, Kind: "null"}, true, ""},
		{"253 files where none is expected", fdArgs{Data: announcing(t, 253, harness.V0, "Ping", int32(0)), Files: 253, Kind: "null"}, false, "Invalid file descriptors for Ping method"},
		{"one file where none is expected", fdArgs{Data: announcing(t, 1, harness.V0, "Create", "memory", "x"), Files: 1, Kind: "dgram"}, false, "Invalid file descriptors for Create method"},
		{"files for an unknown method", fdArgs{Data: announcing(t, 2, harness.V0, "NoSuch"), Files: 2, Kind: "null"}, false, "doesn't exist"},
		{"files with wrong arguments", fdArgs{Data: announcing(t, 2, harness.V0, "CreateScm", "x"), Files: 2, Kind: "null"}, false, "Invalid arguments to CreateScm method"},
		{"two files for one", fdArgs{Data: announcing(t, 2, harness.V0, "CreateScm", "memory", "x", h), Files: 2, Kind: "dgram"}, false, "Invalid file descriptors for CreateScm method"},
		{"an index beyond", fdArgs{Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", dbus.UnixFDIndex(7)), Files: 1, Kind: "dgram"}, false, "Bad file descriptor"},
		{"more than announced", fdArgs{Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h), Files: 2, Kind: "dgram"}, true, ""},
		{"not negotiated", fdArgs{Login: []byte(noFDs), Data: announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h), Files: 1, Kind: "dgram"}, true, ""},
		{"with the login", fdArgs{Login: []byte{}, Data: []byte(login), Files: 1, Kind: "null"}, true, ""},
		{"with the NUL", fdArgs{Login: []byte{}, Data: []byte{0}, Files: 253, Kind: "null"}, true, ""},
	} {
		a := tc.args
		a.Sock, a.Read, a.ToEnd, a.Times = s.d.Sock, true, tc.closed, times(5)
		if a.Login == nil {
			a.Login = []byte(login)
		}
		var got []badResult
		if err := p.Run(passFDs, a, &got); err != nil {
			t.Fatalf("%s: %v", tc.what, err)
		}
		for _, r := range got {
			if r.Closed != tc.closed || !strings.Contains(string(r.Got), tc.text) {
				t.Errorf("%s: closed %v, %q", tc.what, r.Closed, r.Got)
			}
		}
	}
	// Announced, and none there: the original's text, and the next is served.
	c := dial(t, p, s.d.Sock)
	m := c.ask(announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h))
	if want := "Failed to set passcred: Bad file descriptor"; m.Type != dbus.TypeError || m.Body[0] != want {
		t.Errorf("no file: %v, want %s", m, want)
	}
	p.Close(c.fd)

	// Files of all kinds where a socket, or a pidfd, is expected.
	for _, kind := range []string{
		"null", "seqpacket", "listening", "epoll", "pipe", "eventfd", "pidfd", "directory", "path", "udp", "dgram", "stream", "lingering",
	} {
		for _, member := range []string{"CreateScm", "MoveFd"} {
			data := announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h)
			if member == "MoveFd" {
				data = announcing(t, 1, harness.V1, "MoveFd", "", h)
			}
			var got []badResult
			start := time.Now()
			if err := p.Run(passFDs, fdArgs{Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 1, Kind: kind, Read: true}, &got); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > patience() {
				t.Errorf("%s to %s: answered after %v", kind, member, took)
			}
			for _, r := range got {
				good := member == "CreateScm" && (kind == "dgram" || kind == "stream") || member == "MoveFd" && kind == "pidfd"
				if refused := bytes.Contains(r.Got, []byte("l\x03\x01")); refused == good {
					t.Errorf("%s to %s: refused %v, %q", kind, member, refused, r.Got)
				}
			}
		}
	}
	s.over(t, 6*time.Second)

	t.Run("many of them", func(t *testing.T) {
		for _, kind := range []string{"null", "full of itself"} {
			for _, read := range []bool{true, false} {
				for _, data := range [][]byte{announcing(t, 100, harness.V0, "Ping", int32(0)), ping, ping[:30]} {
					a := fdArgs{Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 100, Kind: kind, Times: times(20), Read: read && len(data) != 30}
					if err := p.Run(passFDs, a, nil); err != nil {
						t.Fatalf("%s: %v", kind, err)
					}
				}
			}
		}
		s.over(t, 5*time.Second)
	})
	if s.Exists(harness.Find(t, "memory"), "bad/x") {
		t.Error("something was created")
	}
}

// A socket that lingers when it is closed, with every message that can bring
// one, and left in the socket unread.
func TestKernelBadInputLingeringSocket(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	for what, data := range map[string][]byte{
		"not expected":  announcing(t, 1, harness.V0, "Ping", int32(0)),
		"not announced": call(t, 1, harness.V0, "Ping", int32(0)),
		"CreateScm":     announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h),
		"MoveFd":        announcing(t, 1, harness.V1, "MoveFd", "", h),
		"half":          announcing(t, 1, harness.V1, "MoveFd", "", h)[:40],
	} {
		start := time.Now()
		for _, read := range []bool{what != "half", false} {
			if err := p.Run(passFDs, fdArgs{
				Sock: s.d.Sock, Login: []byte(login), Data: data, Files: 1, Kind: "lingering", Times: times(8), Read: read,
			}, nil); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		t.Logf("%s: %d of them took %v", what, 2*times(8), time.Since(start))
	}
	// Behind what ends the connection before they are received.
	if harness.Pipelines() {
		if err := s.d.Pause(); err != nil {
			t.Fatal(err)
		}
		err := p.Run(passFDs, fdArgs{
			Sock: s.d.Sock, Login: append([]byte{0}, make([]byte, 80<<10)...), Data: []byte("x"), Files: 1, Kind: "lingering", Times: times(16),
		}, nil)
		if err := errors.Join(err, s.d.Resume()); err != nil {
			t.Fatal(err)
		}
	}
	// Not one of them may take its six seconds.
	s.over(t, 4*time.Second)
}

// Lines without end.
func TestKernelBadInputEndlessLogin(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	nul := []byte{0}
	inputs := map[string]input{
		"no NUL":            bytesOf([]byte("AUTH EXTERNAL 30\r\n")),
		"another byte":      bytesOf(append([]byte{1}, login[1:]...)),
		"one line":          {nul, []byte("A"), 300 << 10},
		"one AUTH":          {[]byte("\x00AUTH EXTERNAL "), []byte("30"), 150 << 10},
		"many NULs":         {nul, nul, 300 << 10},
		"BEGIN first":       bytesOf([]byte("\x00BEGIN\r\n")),
		"newlines":          {nul, []byte("\n"), 300 << 10},
		"not printable":     bytesOf([]byte("\x00AUTH EXTERNAL 30\x00\r\n")),
		"a message at once": {append([]byte{0}, call(t, 1, harness.V0, "Ping", int32(0))...), nul, 1024},
	}
	for _, line := range []string{
		"AUTH", "AUTH EXTERNAL", "AUTH EXTERNAL 31", "AUTH ANONYMOUS", "AUTH DBUS_COOKIE_SHA1 30", "DATA", "DATA 30", "CANCEL", "ERROR x", "FOO", "", " ", "NEGOTIATE_UNIX_FD",
	} {
		inputs[line+" for ever"] = input{nul, []byte(line + "\r\n"), 100000}
	}
	s.closes(t, p, false, inputs)
}

// abandonArgs are for abandon: an *Scm call whose caller leaves at a stage of it.
type abandonArgs struct {
	Sock  string
	Call  []byte
	Stage string
	Times int
}

var abandon = harness.Inside("leave an exchange", func(a abandonArgs) (int, error) {
	buf := make([]byte, 4096)
	closed := 0
	for range a.Times {
		c, err := dialRaw(a.Sock)
		if err != nil {
			return closed, err
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return closed, err
		}
		tv := unix.Timeval{Sec: 1}
		if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return closed, err
		}
		var oob []byte
		if a.Stage == "a socket for itself" {
			oob = unix.UnixRights(pair[0])
		} else {
			oob = unix.UnixRights(pair[1])
		}
		if _, err := harness.Login(c, []byte(login)); err != nil {
			return closed, err
		}
		err = unix.Sendmsg(c, a.Call, oob, nil, 0)
		// Files in flight are counted against the sender until the kernel has freed
		// them, since Linux 6.10 later than they were closed.
		for try := 0; errors.Is(err, unix.ETOOMANYREFS) && try < 100; try++ {
			time.Sleep(20 * time.Millisecond)
			err = unix.Sendmsg(c, a.Call, oob, nil, 0)
		}
		if err != nil {
			return closed, err
		}
		unix.Close(pair[1])
		switch a.Stage {
		case "at once", "a socket for itself":
		case "after the kick", "keeping the socket":
			if n, err := harness.Read(pair[0], buf); n != 1 {
				return closed, fmt.Errorf("kick: %d, %w", n, err)
			}
		case "garbage for credentials":
			_, _ = harness.Write(pair[0], bytes.Repeat([]byte("x"), 4096))
		case "files with the credentials":
			null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return closed, err
			}
			var fds []int
			for range 200 {
				fds = append(fds, null)
			}
			_ = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fds...), nil, 0)
			unix.Close(null)
		case "without reading the result":
			if _, err := harness.Write(pair[0], []byte{0}); err != nil {
				return closed, err
			}
		}
		if a.Stage != "keeping the socket" {
			unix.Close(pair[0])
		} else {
			held = append(held, pair[0])
		}
		unix.Close(c)
	}
	return closed, nil
})

// held are files that a puppet keeps until it ends.
var held []int

func TestKernelBadInputAbandonedExchange(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	h := dbus.UnixFDIndex(0)
	for _, stage := range []string{
		"at once", "after the kick", "keeping the socket", "garbage for credentials", "files with the credentials",
		"without reading the result", "a socket for itself",
	} {
		for member, data := range map[string][]byte{
			"CreateScm":            announcing(t, 1, harness.V0, "CreateScm", "memory", "made", h),
			"MovePidScm":           announcing(t, 1, harness.V0, "MovePidScm", "memory", "", h),
			"ListKeysScm":          announcing(t, 1, harness.V0, "ListKeysScm", "memory", "", h),
			"GetTasksRecursiveScm": announcing(t, 1, harness.V0, "GetTasksRecursiveScm", "all", "", h),
		} {
			if err := p.Run(abandon, abandonArgs{s.d.Sock, data, stage, times(25)}, nil); err != nil {
				t.Errorf("%s, %s: %v", member, stage, err)
			}
		}
		s.over(t, 5*time.Second)
	}
}

// slowArgs are for slow.
type slowArgs struct {
	Sock string
	How  string
	N    int
}

// slow makes connections that take the daemon's time, and keeps them.
var slow = harness.Inside("slow clients", func(a slowArgs) ([]int, error) {
	var fds []int
	for range a.N {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return fds, err
		}
		fds = append(fds, fd)
		held = append(held, fd)
		ask := []byte("l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00")
		switch a.How {
		case "says nothing":
			continue
		case "says NUL":
			ask = []byte{0}
		case "never begins":
			ask = []byte("\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\n")
		case "half a message":
			ask = append([]byte(login), ask...)
		}
		if _, err := harness.Begin(fd, ask); err != nil {
			return fds, err
		}
	}
	return fds, nil
})

// deaf asks for much and reads nothing, until the daemon ends it. It returns
// how much it could write.
var deaf = harness.Inside("deaf clients", func(a burstArgs) (int, error) {
	wrote := 0
	var fds []int
	for range 20 {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return wrote, err
		}
		held = append(held, fd)
		fds = append(fds, fd)
		if _, err := harness.Login(fd, []byte(login)); err != nil {
			return wrote, err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return wrote, err
		}
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		for _, fd := range fds {
			n, err := harness.Write(fd, a.Streams[0])
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				return wrote, nil
			}
			wrote += max(n, 0)
		}
		time.Sleep(time.Millisecond)
	}
	return wrote, nil
})

// Clients that never read, never finish their login, or send half a message
// and no more: each is disconnected after its deadline, and holds up nobody.
func TestKernelBadInputSlowClients(t *testing.T) {
	s := newSiege(t)
	b := s.box("bad")
	p := b.Proc
	n := 0
	for _, how := range []string{"says nothing", "says NUL", "never begins", "half a message"} {
		var fds []int
		if err := p.Run(slow, slowArgs{s.d.Sock, how, 50}, &fds); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		n += len(fds)
	}
	d := b.user(0)
	s.Place(d, "bad")
	var wrote int
	introspect := call(t, 1, "org.freedesktop.DBus.Introspectable", "Introspect")
	if err := d.Run(deaf, burstArgs{Sock: s.d.Sock, Streams: [][]byte{bytes.Repeat(introspect, 100)}}, &wrote); err != nil {
		t.Fatal(err)
	}
	t.Logf("deaf clients wrote %d bytes", wrote)
	if open := s.d.FDs(); open < s.fds+n {
		t.Errorf("%d files open, so %d slow clients are not there", open, n)
	}
	if rss := s.status("VmRSS"); rss > 48<<10 {
		t.Errorf("the daemon has %d KiB in memory", rss)
	}
	s.over(t, 15*time.Second)
}

// crowdArgs are for crowd.
type crowdArgs struct {
	Sock  string
	N     int
	Login bool
}

type crowdResult struct {
	// Made connections, of which so many were Served: their login was answered.
	Made, Served int
	Limit        uint64
}

// crowd makes as many connections as it may, and keeps them.
var crowd = harness.Inside("a crowd", func(a crowdArgs) (r crowdResult, err error) {
	rl := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return r, err
	}
	rl.Cur = rl.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return r, err
	}
	r.Limit = rl.Cur
	var fds []int
	for range a.N {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return r, err
		}
		// Full backlogs are tried again for a while.
		for range 200 {
			if err = unix.Connect(fd, &unix.SockaddrUnix{Name: a.Sock}); !errors.Is(err, unix.EAGAIN) {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if err != nil {
			unix.Close(fd)
			continue
		}
		r.Made++
		fds = append(fds, fd)
		if a.Login {
			_, _ = harness.Write(fd, []byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"))
		}
	}
	held = append(held, fds...)
	time.Sleep(300 * time.Millisecond)
	buf := make([]byte, 256)
	for _, fd := range fds {
		if n, _ := harness.Read(fd, buf); n > 0 && bytes.Contains(buf[:n], []byte("OK ")) {
			r.Served++
		}
	}
	return r, nil
})

// 5,000 connections of one uid, from several processes.
func TestKernelBadInputCrowd(t *testing.T) {
	s := newSiege(t)
	s.Make("crowd", 3000, 3000)
	for _, login := range []bool{true, false} {
		var made, served int
		var crowds []*harness.Proc
		rounds := 5
		if testing.Short() {
			rounds = 3
		}
		for range rounds {
			p := s.host(3000, "crowd")
			crowds = append(crowds, p)
			var r crowdResult
			if err := p.Run(crowd, crowdArgs{s.d.Sock, 1000, login}, &r); err != nil {
				t.Fatal(err)
			}
			made += r.Made
			served += r.Served
		}
		t.Logf("login %v: %d connections made, %d answered; %d files", login, made, served, s.d.FDs())
		if made < rounds*900 {
			t.Errorf("only %d connections could be tried", made)
		}
		// Three files for each; without a login half as many may stay.
		bound := s.fds + 3*2048 + 16
		if !login {
			bound = s.fds + 3*1024 + 16
		}
		eventually(t, "what is beyond the bound is closed", func() bool { return s.d.FDs() <= bound })
		if login && served < 500 {
			t.Errorf("only %d connections of one uid are served", served)
		}
		for _, p := range crowds {
			p.Stop()
		}
		s.over(t, 5*time.Second)
	}
}

// Several who take all that each may leave room for others.
func TestKernelBadInputCrowds(t *testing.T) {
	s := newSiege(t)
	var crowds []*harness.Proc
	for uid := uint32(3000); uid < 3006; uid++ {
		cg := fmt.Sprint("crowd", uid)
		s.Make(cg, uid, uid)
		p := s.host(uid, cg)
		crowds = append(crowds, p)
		var r crowdResult
		if err := p.Run(crowd, crowdArgs{s.d.Sock, 2100, true}, &r); err != nil {
			t.Fatal(err)
		}
		t.Logf("uid %d: %d connections made, %d served; %d files", uid, r.Made, r.Served, s.d.FDs())
	}
	// Somebody new, while all of them stay.
	s.Make("late", 4000, 4000)
	start := time.Now()
	c := s.host(4000, "late").MustDial(s.d.Sock)
	asker{t, c}.v0("Create", "memory", "late")
	c.Close()
	if took := time.Since(start); took > patience() {
		t.Errorf("who comes late is served after %v", took)
	}
	time.Sleep(300 * time.Millisecond) // for the witnesses
	for _, p := range crowds {
		p.Stop()
	}
	s.over(t, 5*time.Second)
}
