package api

import "strings"

// Names on the wire (docs/PROTOCOL.md).
const (
	// ObjectPath is the object that serves the two interfaces for cgroups.
	ObjectPath = "/org/linuxcontainers/cgmanager"
	// RealtimePath is the object that serves RealtimeInterface.
	RealtimePath = "/org/freedesktop/RealtimeKit1"
	// Interface0 is the original daemon's interface.
	Interface0 = "org.linuxcontainers.cgmanager0_0"
	// Interface1 is this project's own.
	Interface1 = "org.linuxcontainers.CGManager1"
	// RealtimeInterface is rtkit's interface, and the name that it has on a bus.
	RealtimeInterface = "org.freedesktop.RealtimeKit1"
	// BusName is a name that the daemon answers to where a client insists on
	// one; the destination of a message is ignored.
	BusName = "org.linuxcontainers.cgmanager"
	// Version0 is Interface0's property api_version.
	Version0 int32 = 10
	// ErrorBusy is the one D-Bus error name of our own.
	ErrorBusy = Interface1 + ".Error.Busy"
)

// Arg is an argument of a method: its name and its D-Bus type.
type Arg struct{ Name, Type string }

// Method is a method of an interface as introspection shows it.
type Method struct {
	Name    string
	In, Out []Arg
	// Changes says that the method may change cgroups or tasks; such calls
	// are charged to the caller's rate of changes.
	Changes bool
	// Holds says that the Backend keeps a handle on the sender until the
	// connection ends; such calls are charged as connections are.
	Holds bool
	// Asks says that the Backend may ask another daemon, polkit, and wait for it;
	// such calls are in nobody's way but each other's.
	Asks bool
	// Scm says that the method is the side channel form of another: the last
	// argument is a socket over which credentials and the result travel.
	Scm bool
	// Overload says that another entry of the same name comes first;
	// introspection leaves this one out, because bindings know one signature
	// a name.
	Overload bool
}

// Property is a property of an interface; all are read-only.
type Property struct{ Name, Type string }

// Interface is a D-Bus interface. One with a Path is of the object there, the
// others are of every object.
type Interface struct {
	Name, Path string
	Methods    []Method
	Properties []Property
}

// InSignature returns the D-Bus signature of the method's arguments.
func (m *Method) InSignature() string { return signature(m.In) }

// OutSignature returns the D-Bus signature of the method's results.
func (m *Method) OutSignature() string { return signature(m.Out) }

func signature(args []Arg) string {
	var s strings.Builder
	for _, a := range args {
		s.WriteString(a.Type)
	}
	return s.String()
}

// Interfaces returns the interfaces that are served, in the order in which a
// call without an interface looks for its method.
func Interfaces() []Interface {
	return []Interface{
		{Name: Interface0, Path: ObjectPath, Methods: methods0(), Properties: []Property{{"api_version", "i"}}},
		{Name: Interface1, Path: ObjectPath, Methods: methods1(), Properties: []Property{{"Version", "s"}}},
		{Name: RealtimeInterface, Path: RealtimePath, Methods: methodsRealtime(), Properties: []Property{
			{"RTTimeUSecMax", "x"}, {"MaxRealtimePriority", "i"}, {"MinNiceLevel", "i"},
		}},
		standard("org.freedesktop.DBus.Peer",
			Method{Name: "Ping"},
			Method{Name: "GetMachineId", Out: []Arg{{"machine_uuid", "s"}}}),
		standard("org.freedesktop.DBus.Properties",
			Method{Name: "Get", In: []Arg{{"interface_name", "s"}, {"property_name", "s"}}, Out: []Arg{{"value", "v"}}},
			Method{Name: "GetAll", In: []Arg{{"interface_name", "s"}}, Out: []Arg{{"properties", "a{sv}"}}},
			Method{Name: "Set", In: []Arg{{"interface_name", "s"}, {"property_name", "s"}, {"value", "v"}}}),
		standard("org.freedesktop.DBus.Introspectable",
			Method{Name: "Introspect", Out: []Arg{{"xml_data", "s"}}}),
	}
}

func standard(name string, methods ...Method) Interface {
	return Interface{Name: name, Methods: methods}
}

func methods0() []Method {
	var (
		controller = Arg{"controller", "s"}
		cgroup     = Arg{"cgroup", "s"}
		key        = Arg{"key", "s"}
		value      = Arg{"value", "s"}
		file       = Arg{"file", "s"}
		mode       = Arg{"mode", "i"}
		pid        = Arg{"pid", "i"}
		recursive  = Arg{"recursive", "i"}
		existed    = []Arg{{"existed", "i"}}
		output     = []Arg{{"output", "s"}}
		pids       = []Arg{{"results", "ai"}}
		names      = []Arg{{"output", "as"}}
		in         = func(a ...Arg) []Arg { return a }
	)
	ms := []Method{{Name: "Ping", In: in(Arg{"junk", "i"})}}
	// both adds a method and its side channel form, which takes a socket in
	// place of the last n arguments: those come as credentials.
	both := func(m Method, n int) {
		s := Method{Name: m.Name + "Scm", Changes: m.Changes, Scm: true}
		s.In = append(append(s.In, m.In[:len(m.In)-n]...), Arg{"sockfd", "h"})
		ms = append(ms, m, s)
	}
	both(Method{Name: "GetPidCgroup", In: in(controller, pid), Out: output}, 1)
	both(Method{Name: "GetPidCgroupAbs", In: in(controller, pid), Out: output}, 1)
	both(Method{Name: "MovePid", In: in(controller, cgroup, pid), Changes: true}, 1)
	both(Method{Name: "MovePidAbs", In: in(controller, cgroup, pid), Changes: true}, 1)
	both(Method{Name: "Create", In: in(controller, cgroup), Out: existed, Changes: true}, 0)
	both(Method{Name: "Chown", In: in(controller, cgroup, Arg{"uid", "i"}, Arg{"gid", "i"}), Changes: true}, 2)
	both(Method{Name: "Chmod", In: in(controller, cgroup, file, mode), Changes: true}, 0)
	both(Method{Name: "GetValue", In: in(controller, cgroup, key), Out: output}, 0)
	both(Method{Name: "SetValue", In: in(controller, cgroup, key, value), Changes: true}, 0)
	both(Method{Name: "Remove", In: in(controller, cgroup, recursive), Out: existed, Changes: true}, 0)
	both(Method{Name: "GetTasks", In: in(controller, cgroup), Out: pids}, 0)
	both(Method{Name: "GetTasksRecursive", In: in(controller, cgroup), Out: pids}, 0)
	both(Method{Name: "ListChildren", In: in(controller, cgroup), Out: names}, 0)
	both(Method{Name: "RemoveOnEmpty", In: in(controller, cgroup), Changes: true}, 0)
	both(Method{Name: "Prune", In: in(controller, cgroup), Changes: true}, 0)
	ms = append(ms, Method{Name: "ListControllers", Out: names})
	both(Method{Name: "ListKeys", In: in(controller, cgroup), Out: []Arg{{"output", "a(suuu)"}}}, 0)
	return ms
}

func methods1() []Method {
	var (
		name        = Arg{"name", "s"}
		controllers = Arg{"controllers", "as"}
		values      = Arg{"values", "a{ss}"}
		thread      = Arg{"thread", "u"}
		in          = func(a ...Arg) []Arg { return a }
	)
	return []Method{
		{Name: "ListControllers", Out: in(controllers)},
		{Name: "ListControllers", In: in(name), Out: in(controllers), Overload: true},
		{Name: "Create", In: in(name, controllers, values), Out: in(Arg{"created", "b"}), Changes: true},
		{Name: "SetValue", In: in(name, values), Changes: true},
		{Name: "GetValue", In: in(name, Arg{"keys", "as"}), Out: in(values)},
		{Name: "ListChildren", In: in(name), Out: in(Arg{"names", "as"})},
		{Name: "ListTasks", In: in(name), Out: in(Arg{"pids", "au"}, Arg{"hidden", "u"})},
		{Name: "Chown", In: in(name, Arg{"uid", "u"}, Arg{"gid", "u"}), Changes: true},
		{Name: "Move", In: in(name, Arg{"pid", "u"}), Changes: true},
		{Name: "MoveFd", In: in(name, Arg{"pidfd", "h"}), Changes: true},
		{Name: "Delete", In: in(name), Changes: true},
		{Name: "DeleteForce", In: in(name), Changes: true},
		{Name: "Kill", In: in(name), Changes: true},
		{Name: "Delegate", In: in(name, controllers), Out: in(Arg{"path", "s"}), Changes: true},
		{Name: "ActFor", Holds: true},
		{Name: "ListGrants", Out: in(Arg{"grants", "a(uuusixts)"})},
		{Name: "Grant", In: in(thread, Arg{"policy", "s"}, Arg{"level", "i"}), Changes: true, Asks: true},
		{Name: "Revoke", In: in(thread), Changes: true},
		{Name: "GrantLimits", In: in(Arg{"pid", "u"}), Out: in(Arg{"limits", "a{ss}"}), Changes: true},
		{Name: "RevokeLimits", In: in(Arg{"pid", "u"}), Out: in(Arg{"unreached", "au"}), Changes: true},
	}
}

// methodsRealtime are rtkit's; the names of its arguments too.
func methodsRealtime() []Method {
	var (
		process  = Arg{"process", "t"}
		thread   = Arg{"thread", "t"}
		priority = Arg{"priority", "u"}
		nice     = Arg{"priority", "i"}
		in       = func(a ...Arg) []Arg { return a }
	)
	return []Method{
		{Name: "MakeThreadRealtime", In: in(thread, priority), Changes: true, Asks: true},
		{Name: "MakeThreadRealtimeWithPID", In: in(process, thread, priority), Changes: true, Asks: true},
		{Name: "MakeThreadHighPriority", In: in(thread, nice), Changes: true, Asks: true},
		{Name: "MakeThreadHighPriorityWithPID", In: in(process, thread, nice), Changes: true, Asks: true},
		{Name: "ResetKnown", Changes: true},
		{Name: "ResetAll", Changes: true},
		{Name: "Exit", Changes: true},
	}
}
