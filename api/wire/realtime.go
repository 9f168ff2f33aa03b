package wire

import "cgmanager/api"

// Property is a property of an interface.
type Property struct {
	Name string
	// Write writes the value, a variant.
	Write func(e *Encoder)
}

// RealtimeProperties are those of api.RealtimeInterface with the values, in rtkit's
// types: its clients look at them.
func RealtimeProperties(v api.RealtimeProperties) []Property {
	number := func(n int32) func(*Encoder) {
		return func(e *Encoder) {
			e.VariantSignature("i")
			e.Int32(n)
		}
	}
	return []Property{
		{"RTTimeUSecMax", func(e *Encoder) {
			e.VariantSignature("x")
			e.Int64(v.RTTimeUSecMax)
		}},
		{"MaxRealtimePriority", number(v.MaxRealtimePriority)},
		{"MinNiceLevel", number(v.MinNiceLevel)},
	}
}
