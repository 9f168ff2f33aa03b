// Package policy reads realtime.toml, which says who is granted what. It decides
// on facts alone, and knows no process.
package policy

// Target is what the rules ask about: the process that is to be granted something,
// in the host's numbers.
type Target struct {
	// UID is its effective uid, EGID its effective gid, and Groups its
	// supplementary ones.
	UID, EGID uint32
	Groups    []uint32
	// Program is the file that it runs, as its own mount namespace names it; ""
	// where that is not known.
	Program string
	// Container: it is not in the daemon's user and pid namespaces. Root is the
	// host's uid of the container's root, NoID where there is none.
	Container bool
	Root      uint32
}

// Verdict is what a rule gives.
type Verdict struct {
	// Line of the file at which the rule stands, for the log.
	Line int
	// Allow is false where the rule refuses.
	Allow bool
	// MaxPriority and MinNice bound what is granted; RR and FIFO are the policies
	// that may be.
	MaxPriority, MinNice int
	RR, FIFO             bool
	// Budget is how much of a CPU a thread may take, in percent: of a period of the
	// watchdog's, and, where the kernel budgets, the cgroup's realtime runtime. 0 means
	// the default.
	Budget int
	// Limits are what GrantLimits gives; nil means nothing.
	Limits *Limits
}

// Limits are resource limits (setrlimit(2)). A field that is nil is left alone.
type Limits struct {
	// RTPrio is RLIMIT_RTPRIO, Nice the lowest nice level that RLIMIT_NICE allows,
	// MemLock RLIMIT_MEMLOCK in bytes (^0 means no limit).
	RTPrio  *uint64
	Nice    *int
	MemLock *uint64
}

// Table is a policy file that was read.
type Table struct{}

// Load reads a file. An error names the file, line and column. A file that does not
// exist is an empty Table.
func Load(path string) (*Table, error) { return nil, nil }

// Decide returns what the first rule that matches says, and false if none does.
func (t *Table) Decide(Target) (Verdict, bool) { return Verdict{}, false }
