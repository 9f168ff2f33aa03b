package wire

import (
	"fmt"

	"cgmanager/api"
)

// ArgumentError is what libdbus, and so rtkit, says of arguments of wrong types. Its
// D-Bus name is org.freedesktop.DBus.Error.InvalidArgs.
type ArgumentError string

// Error implements error.
func (e ArgumentError) Error() string { return string(e) }

// WrongArguments compares the signature of a call with the arguments that a
// method has, all of basic types. More than those are no error. The texts are
// those of dbus_message_get_args, the final newline of the one included; it is ""
// where nothing is wrong.
func WrongArguments(in []api.Arg, sig string) ArgumentError {
	for i, arg := range in {
		got := byte(0)
		if i < len(sig) {
			got = sig[i]
		} else if i > 0 {
			return ArgumentError(fmt.Sprintf("Message has only %d arguments, but more were expected", i))
		}
		if got != arg.Type[0] {
			return ArgumentError(fmt.Sprintf("Argument %d is specified to be of type %q, but is actually of type %q\n",
				i, typeName(arg.Type[0]), typeName(got)))
		}
	}
	return ""
}

// typeName returns what libdbus calls the type whose signature starts with c, 0
// where there is none.
func typeName(c byte) string {
	switch c {
	case 'y':
		return "byte"
	case 'b':
		return "boolean"
	case 'n':
		return "int16"
	case 'q':
		return "uint16"
	case 'i':
		return "int32"
	case 'u':
		return "uint32"
	case 'x':
		return "int64"
	case 't':
		return "uint64"
	case 'd':
		return "double"
	case 's':
		return "string"
	case 'o':
		return "object_path"
	case 'g':
		return "signature"
	case 'h':
		return "unix_fd"
	case 'a':
		return "array"
	case '(':
		return "struct"
	case 'v':
		return "variant"
	}
	return "invalid"
}
