/* vmcompute.dll, as far as anybody here calls it: access, by the older names. */
#include "fake.h"

HRESULT fake_access(int grants, const WCHAR16 *vm_id, const WCHAR16 *path);

EXPORT HRESULT GrantVmAccess(const WCHAR16 *vm_id, const WCHAR16 *path) {
    return fake_access(1, vm_id, path);
}

EXPORT HRESULT RevokeVmAccess(const WCHAR16 *vm_id, const WCHAR16 *path) {
    return fake_access(0, vm_id, path);
}
