package ikev2

// VendorID is the Vendor ID payload (RFC 7296, 3.12).
type VendorID struct {
	Data []byte
}

// PayloadType is PayloadVendorID.
func (*VendorID) PayloadType() PayloadType { return PayloadVendorID }

// Append appends the ID.
func (v *VendorID) Append(b []byte) ([]byte, error) { return append(b, v.Data...), nil }

func parseVendorID(b []byte) (Payload, error) { return &VendorID{Data: b}, nil }
