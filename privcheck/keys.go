package privcheck

// KeyClass says who may write a kind of control file (clause 6).
type KeyClass int

// The classes. The zero value may be written by nobody.
const (
	// NeverWritten: not by anybody, over this interface.
	NeverWritten KeyClass = iota
	// HostRootOnly: by host root alone.
	HostRootOnly
	// Delegable: by whoever has write privilege over the file.
	Delegable
)

// ClassOf returns the class of the kernel's control file called name. A name
// that is not in the table is NeverWritten; it may still be read.
func ClassOf(name string) KeyClass { panic("todo") }
