package e2e_test

import (
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// TestKernelDevices: device rules over the socket, the same answers on v1 and
// v2, for a user of the host and for the root of a container, by either
// interface.
func TestKernelDevices(t *testing.T) {
	for _, who := range []string{"host user", "container root", "container root with a cgroup namespace"} {
		t.Run(who, func(t *testing.T) {
			w := newWorld(t)
			c := &client{w: w, t: t, cg: "outer/own", root: who != "host user"}
			w.Make("outer", 0, 0)
			host := &client{w: w, t: t, cg: "", Proc: w.host(0, "")}
			host.c = host.MustDial(w.d.Sock)
			defer host.c.Close()
			host.v1("", "SetValue", "outer", values{"devices_blacklist": "c 1:7 rwm"})

			if c.root {
				c.Proc = w.box(c.cg).Proc
			} else {
				w.Make(c.cg, 1000, 1000)
				c.Proc = w.host(1000, c.cg)
			}
			if strings.Contains(who, "namespace") {
				c.Proc = c.Spawn(harness.Spec{CgroupNS: true})
			}
			c.c = c.MustDial(w.d.Sock)
			defer c.c.Close()
			c.devices(host)
		})
	}
}

func (c *client) devices(host *client) {
	const everything = "map[devices_list:a *:* rwm]"
	rules := func(want, name string) {
		c.t.Helper()
		c.v1("map[devices_list:"+want+"]", "GetValue", name, list{"devices_list"})
	}
	c.v1("true", "Create", "web", list{"devices"}, values{})
	c.v1(everything, "GetValue", "web", list{"devices_list"})
	c.may("web", "</dev/zero", true)
	c.may("web", "</dev/full", false) // what the host took from all around

	// A whitelist, made at once and by one request each.
	c.v1("", "SetValue", "web", values{"devices_blacklist": "a"})
	c.v1("", "SetValue", "web", values{"devices_whitelist": "c 1:3 rwm,c 1:9 r"})
	rules("c 1:3 rwm,c 1:9 r", "web")
	c.v1("map[devices.list:c 1:3 rwm\nc 1:9 r]", "GetValue", "web", list{"devices.list"})
	c.v0("c 1:3 rwm\nc 1:9 r", "GetValue", "devices", "web", "devices.list")
	c.may("web", "</dev/zero", false)
	c.may("web", "<>/dev/null", true)
	c.may("web", "</dev/urandom", true)
	c.may("web", "<>/dev/urandom", false)
	c.may("", "</dev/zero", true)

	// What is below gets no more.
	c.v1("true", "Create", "web/in", list{"devices"}, values{})
	rules("c 1:3 rwm,c 1:9 r", "web/in")
	c.v1("AccessDenied", "SetValue", "web/in", values{"devices_whitelist": "c 1:5 r"})
	c.v1("AccessDenied", "SetValue", "web/in", values{"devices_whitelist": "a"})
	c.v0("InvalidArgs", "SetValue", "devices", "web/in", "devices.allow", "c 1:9 rw")
	c.may("web/in", "</dev/zero", false)
	c.may("web/in", "<>/dev/null", true)
	c.v1("", "SetValue", "web", values{"devices_whitelist": "c 1:5 r"})
	c.may("web", "</dev/zero", true)
	c.may("web/in", "</dev/zero", false)
	c.v1("", "SetValue", "web/in", values{"devices.allow": "c 1:5 r"})
	c.may("web/in", "</dev/zero", true)

	// What is above loses, all lose.
	c.v0("", "SetValue", "devices", "web", "devices.deny", "c 1:5 r")
	c.may("web", "</dev/zero", false)
	c.may("web/in", "</dev/zero", false)
	rules("c 1:3 rwm,c 1:9 r", "web/in")
	host.v1("", "SetValue", "outer", values{"devices_blacklist": "c 1:9 r"})
	c.may("web/in", "</dev/urandom", false)
	rules("c 1:3 rwm", "web/in")
	c.v1("AccessDenied", "SetValue", "web", values{"devices_whitelist": "c 1:9 r"})
	c.v1("AccessDenied", "SetValue", "web", values{"devices_whitelist": "c 1:7 r"})

	// What is wrong changes nothing.
	for _, bad := range (list{"", "c 1:3", "c 1:3 x", "x 1:3 r", "c 1:3 r,", "c 1:4294967296 r"}) {
		c.v1("InvalidArgs", "SetValue", "web", values{"devices_whitelist": bad})
		c.v1("InvalidArgs", "SetValue", "web", values{"devices_blacklist": bad})
	}
	c.v1("InvalidArgs", "SetValue", "web", values{"devices_blacklist": "a"})
	c.v1("InvalidArgs", "SetValue", "web", values{"devices.deny": "nonsense"})
	c.v1("AccessDenied", "SetValue", "web", values{"devices_list": "a"})
	c.v1("AccessDenied", "SetValue", "", values{"devices_blacklist": "a"})
	rules("c 1:3 rwm", "web/in")

	// A daemon that starts now finds the rules.
	next := harness.StartDaemon(c.t)
	before := c.c
	c.c = c.MustDial(next.Sock)
	rules("c 1:3 rwm", "web")
	c.v1("AccessDenied", "SetValue", "web/in", values{"devices_whitelist": "c 1:5 r"})
	c.v1("", "SetValue", "web/in", values{"devices_blacklist": "c 1:3 wm"})
	c.may("web/in", "<>/dev/null", false)
	c.c.Close()
	c.c = before

	// A new cgroup of an old name knows nothing of it.
	c.v1("", "Delete", "web")
	c.v1("true", "Create", "web", list{"devices"}, values{})
	c.v1(everything, "GetValue", "web", list{"devices_list"})
	c.may("web", "</dev/zero", true)
	c.v1("", "Delete", "web")
}

// may starts a shell, moves it to a cgroup, and looks whether it can open what
// it redirects to.
func (c *client) may(name, redirection string, want bool) {
	c.t.Helper()
	v := c.Launch(nil, "/bin/sh", "-c", "read x; (: "+redirection+") 2>&1 && printf ok")
	c.v1("", "Move", name, uint32(v.PID))
	if _, err := v.In.Write([]byte("\n")); err != nil {
		c.t.Fatal(err)
	}
	said, err := v.Said(cgtest.Patience(10 * time.Second))
	if err != nil {
		c.t.Fatal(err)
	}
	c.end(v)
	if got := said == "ok"; got != want || !got && !strings.Contains(said, "not permitted") {
		c.t.Errorf("%s in %q: %q", redirection, name, said)
	}
}
