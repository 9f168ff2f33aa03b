package api

// Cred is a credential as the kernel translated it for this process
// (SO_PEERCRED, SCM_CREDENTIALS; unix(7)): numbers of the daemon's own
// namespaces. PID 0 means a process that is not visible here, or the end of a
// stream; the transport refuses it before a Backend sees it.
type Cred struct {
	PID      int32
	UID, GID uint32
}

// NoID is the id that stands for "unknown" or "leave as it is": (uid_t)-1.
const NoID = ^uint32(0)

// MaxHops bounds a chain of those for whom a peer acts (ActFor): user and pid
// namespaces nest 32 deep, and who acts for whom follows them.
const MaxHops = 32

// Peer is what a Backend remembers about the process that opened a connection.
// The transport asks for it once a connection and closes it with the connection.
// Its methods may be called from several goroutines.
type Peer interface {
	// AcceptsIdentity reports whether uid, the number that the client named
	// in its SASL EXTERNAL line, is the opener's uid, either of which is seen
	// from the opener's own user namespace.
	AcceptsIdentity(uid uint32) bool
	// Accounts names whom to charge for what this peer uses: its uid, and
	// every container around it up to, not including, the host. A bound holds
	// for each of them. Host root has none and is bounded by nobody.
	Accounts() []string
	// Close lets go of the handles behind the Peer. No request with this Peer
	// is running any more.
	Close()
}

// Request says who asks. A Backend judges the opener of the connection, those
// for whom it acts (ActFor), the sender of the message where it differs, and For
// where it is set, each by its own namespaces and cgroups; all of them must be
// entitled.
type Request struct {
	// Peer is the opener of the connection, from Backend.Open.
	Peer Peer
	// Opener is its credential (SO_PEERCRED).
	Opener Cred
	// Sender is the credential that came with the bytes of the message.
	Sender Cred
	// For is set in an *Scm call: the requestor for whom the peer, a proxy,
	// acts. Names are relative to For's cgroup, and pids are exchanged in the
	// daemon's own pid namespace (the kernel translates them on the side
	// channel); ids in replies are the daemon's own too.
	For *Cred
}

// Victim names a task: by a number in the requestor's pid namespace, or, in an
// *Scm call, by a credential that the kernel translated.
type Victim struct {
	// PID is the number as the requestor wrote it. Ignored if Cred is set.
	PID int64
	// Cred is the second credential of an *Scm call. Its uid and gid are not
	// facts about the victim.
	Cred *Cred
}

// Owner names a new owner: by numbers in the requestor's user namespace, or,
// in ChownScm, by a credential that the kernel translated.
type Owner struct {
	// UID and GID are the requestor's own numbers; NoID leaves one as it is.
	UID, GID uint32
	// Host says that UID and GID are the daemon's own numbers already.
	Host bool
}

// Key is an entry of ListKeys: a file of a cgroup with its owner, in the
// requestor's user namespace (NoID where it is not mapped there), and its
// whole st_mode.
type Key struct {
	Name     string
	UID, GID uint32
	Mode     uint32
}

// Existed is the int32 of cgmanager0_0's Create and Remove.
type Existed int32

// The values of Existed, as the original daemon answers them.
const (
	// DidNotExist: Create made the cgroup; Remove found nothing to remove.
	DidNotExist Existed = -1
	// DidExist: Create found the cgroup; Remove removed it.
	DidExist Existed = 1
)

// Backend answers requests. Every method may be called from several
// goroutines at once and returns an *Error on failure.
type Backend interface {
	// Open establishes the opener of a new connection. pidfd is a handle on
	// it (SO_PEERPIDFD) or -1 where the kernel has none to give; Open owns it
	// from the call on, whatever it returns.
	Open(opener Cred, pidfd int) (Peer, error)
	CGManager1
	CGManager0
	RealtimeKit1
}

// CGManager1 is the interface org.linuxcontainers.CGManager1. Names are
// relative to the requestor's own cgroup; "" is that cgroup itself. Numbers
// are those of the requestor's namespaces. Each method is all or nothing over
// every hierarchy that it touches.
type CGManager1 interface {
	// ListControllers returns the controllers that the host has, or, if name
	// is not nil, those in whose hierarchies the cgroup exists.
	ListControllers(rq *Request, name *string) ([]string, error)
	// Create makes the cgroup in the hierarchies of the given controllers
	// (none given: all but the name= ones), with its missing parents, and
	// sets values. It reports whether anything was created.
	Create(rq *Request, name string, controllers []string, values map[string]string) (bool, error)
	// SetValue sets keys, abstract or the kernel's own names (docs/KEYS.md).
	SetValue(rq *Request, name string, values map[string]string) error
	// GetValue reads keys.
	GetValue(rq *Request, name string, keys []string) (map[string]string, error)
	// ListChildren returns the names of the direct children, sorted.
	ListChildren(rq *Request, name string) ([]string, error)
	// ListTasks returns the processes in the cgroup, sorted, and how many
	// more there are that the requestor cannot see.
	ListTasks(rq *Request, name string) (pids []uint32, hidden uint32, err error)
	// Chown gives the cgroup and its files of delegation away. NoID leaves an
	// id as it is.
	Chown(rq *Request, name string, uid, gid uint32) error
	// Move moves the process pid; if pid is a thread that does not lead its
	// process, that thread alone, where the hierarchy can.
	Move(rq *Request, name string, pid uint32) error
	// MoveFd moves the process behind a pidfd that the requestor passed. The
	// transport closes pidfd after the call.
	MoveFd(rq *Request, name string, pidfd int) error
	// Delete removes the cgroup and what lies below it, if no task is left.
	Delete(rq *Request, name string) error
	// DeleteForce moves what tasks there are to the cgroup's parent first.
	DeleteForce(rq *Request, name string) error
	// Kill kills every task in the cgroup and below; it loses none that fork
	// meanwhile.
	Kill(rq *Request, name string) error
	// Delegate gives the requestor a subtree to manage by itself: the cgroup is
	// made if need be, in the hierarchies of the given controllers (none given:
	// those in which the requestor has a place), and can pass its controllers
	// on; the directory and the files of delegation are the requestor's, and
	// its limits nobody's but the host's. It returns where the cgroup lies as
	// the requestor's own cgroup namespace shows it.
	Delegate(rq *Request, name string, controllers []string) (path string, err error)
	// ActFor adds the sender of the message to those for whom the peer, a
	// proxy, makes its later requests: each call names one who lies within the
	// one before it. The last is a client's process, and its requests are
	// judged as if it were the opener of a connection of its own; all the
	// others, from the peer inwards, are proxies between.
	ActFor(rq *Request) error
	// ListGrants returns the grants of realtime and of high priority that the
	// requestor may know of, the oldest first: its own, those of the processes
	// that it has privilege over, all of them for host root.
	ListGrants(rq *Request) ([]Grant, error)
	// Grant gives a thread a scheduling policy and keeps watch over it.
	// thread is a thread id in the requestor's pid namespace; policy is "rr" or
	// "fifo" with the priority as level, or "other" with the nice level.
	Grant(rq *Request, thread uint32, policy string, level int32) error
	// Revoke takes a grant back: the thread is SCHED_OTHER at nice 0 again.
	Revoke(rq *Request, thread uint32) error
	// GrantLimits raises the resource limits of a process to what the policy file
	// gives it, so that it can make its threads realtime, and lock memory, by
	// itself. It returns what was given, by the names of setrlimit(2) in lower
	// case ("rtprio", "nice", "memlock", "rttime").
	GrantLimits(rq *Request, pid uint32) (map[string]string, error)
	// RevokeLimits takes that back from the process and all its descendants in
	// its container, whose threads are SCHED_OTHER again. It returns those that it
	// could not reach.
	RevokeLimits(rq *Request, pid uint32) (unreached []uint32, err error)
}

// Grant is an entry of ListGrants.
type Grant struct {
	// PID, TID and UID are the requestor's numbers of the thread and its owner;
	// NoID where the owner is not mapped there. TID is 0 of limits.
	PID, TID, UID uint32
	// Policy is "rr", "fifo", "other" or "limits", Level the priority, or the
	// nice level.
	Policy string
	Level  int32
	// Since is when it was granted, in seconds since 1970.
	Since int64
	// CPU is what the thread has used since, in microseconds.
	CPU uint64
	// State is "granted", or "demoted" where the watchdog has taken it back for
	// now.
	State string
}

// RealtimeKit1 is rtkit's interface org.freedesktop.RealtimeKit1. What fails is
// told by the kind of the error (RealtimeError). Numbers are those of the
// requestor's pid namespace.
type RealtimeKit1 interface {
	// RealtimeRefused returns the error with which every request of the peer's is
	// answered for now, whatever its arguments, or nil. It does not wait.
	RealtimeRefused(rq *Request) error
	// MakeThreadRealtime gives a thread realtime scheduling at a priority.
	MakeThreadRealtime(rq *Request, t Thread, priority uint32) error
	// MakeThreadHighPriority gives a thread a nice level.
	MakeThreadHighPriority(rq *Request, t Thread, nice int32) error
	// ResetKnown takes back every grant. Host root's alone.
	ResetKnown(rq *Request) error
	// ResetAll makes every realtime thread of the host SCHED_OTHER but those of
	// root's. Host root's alone.
	ResetAll(rq *Request) error
	// Exit takes back every grant, gives up the name on the system bus and grants
	// no more until the daemon is started again, or asked over the bus by
	// activation. Host root's alone.
	Exit(rq *Request) error
	// RealtimeProperties returns the properties, as they hold for the requestor.
	RealtimeProperties(rq *Request) (RealtimeProperties, error)
}

// Thread names a thread as rtkit's clients do.
type Thread struct {
	// Process is the number of its process, unless it is the requestor's own.
	Process uint64
	// Own says that it is; so do the Processes 2^32-1 and 2^64-1.
	Own bool
	// ID is the number of the thread, 0 the process's first one.
	ID uint64
}

// RealtimeProperties are the properties of RealtimeKit1.
type RealtimeProperties struct {
	// RTTimeUSecMax is the highest hard RLIMIT_RTTIME with which a process gets
	// realtime, in microseconds.
	RTTimeUSecMax int64
	// MaxRealtimePriority and MinNiceLevel are the bounds of what is granted.
	MaxRealtimePriority, MinNiceLevel int32
}

// CGManager0 is the interface org.linuxcontainers.cgmanager0_0, the original
// daemon's. A controller argument may be a comma separated list or "all" where
// the original takes one. A cgroup argument follows the original's rules for a
// leading "/", each method its own; docs/PROTOCOL.md lists them.
type CGManager0 interface {
	GetPidCgroup0(rq *Request, controller string, v Victim) (string, error)
	GetPidCgroupAbs0(rq *Request, controller string, v Victim) (string, error)
	MovePid0(rq *Request, controller, cgroup string, v Victim) error
	MovePidAbs0(rq *Request, controller, cgroup string, v Victim) error
	Create0(rq *Request, controller, cgroup string) (Existed, error)
	Chown0(rq *Request, controller, cgroup string, owner Owner) error
	// Chmod0 changes the mode of a file of the cgroup, or with file "" of the
	// cgroup's directory.
	Chmod0(rq *Request, controller, cgroup, file string, mode int32) error
	GetValue0(rq *Request, controller, cgroup, key string) (string, error)
	SetValue0(rq *Request, controller, cgroup, key, value string) error
	Remove0(rq *Request, controller, cgroup string, recursive bool) (Existed, error)
	// GetTasks0 returns pids in the requestor's pid namespace, without those
	// that it cannot see; if rq.For is set, the daemon's own pids.
	GetTasks0(rq *Request, controller, cgroup string) ([]int32, error)
	GetTasksRecursive0(rq *Request, controller, cgroup string) ([]int32, error)
	ListChildren0(rq *Request, controller, cgroup string) ([]string, error)
	RemoveOnEmpty0(rq *Request, controller, cgroup string) error
	Prune0(rq *Request, controller, cgroup string) error
	ListControllers0(rq *Request) ([]string, error)
	ListKeys0(rq *Request, controller, cgroup string) ([]Key, error)
}
