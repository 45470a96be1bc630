/* The exported functions: handles of systems and operations, and the threads behind operations.
 *
 * What was closed stays allocated until the test is over, so that no new handle has its address
 * and its use is seen.
 */
#include "fake.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GENERIC_ALL 0x10000000u
#define INFINITE 0xFFFFFFFFu

typedef struct Handle {
    char *id;
    bool closed;
    int inside; /* operations that have begun on it and have not ended */
    struct Handle *next;
} Handle;

typedef struct Operation {
    bool closed, refused, begun, told, done;
    int waiting;
    Call call;
    Handle *system;
    char *document;
    Turn *turn;
    HRESULT code;
    char *result;
    struct Operation *next;
} Operation;

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
Text documents;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static Handle *handles;
static Operation *operations;
static int threads, pending;

static Handle *live_system(void *handle, const char *function) {
    for (Handle *one = handles; one; one = one->next)
        if (one == handle && !one->closed)
            return one;
    violation("%s: no open system: %p", function, handle);
    return NULL;
}

static Operation *live_operation(void *handle, const char *function) {
    for (Operation *one = operations; one; one = one->next)
        if (one == handle && !one->closed)
            return one;
    violation("%s: no open operation: %p", function, handle);
    return NULL;
}

int systems_open(void) {
    int count = 0;
    for (Handle *one = handles; one; one = one->next)
        count += !one->closed;
    return count;
}

int operations_alive(void) {
    int count = 0;
    for (Operation *one = operations; one; one = one->next)
        count += !one->closed;
    return count;
}

static struct timespec after(uint32_t milliseconds) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    time.tv_sec += milliseconds / 1000;
    time.tv_nsec += milliseconds % 1000 * 1000000L;
    if (time.tv_nsec >= 1000000000L) {
        time.tv_sec++;
        time.tv_nsec -= 1000000000L;
    }
    return time;
}

/* --- Systems --- */

static HRESULT open_system(const WCHAR16 *id, uint32_t access, void **system) {
    if (!system)
        return violation("HcsOpenComputeSystem: no place for the handle"), E_INVALIDARG;
    *system = NULL;
    if (access != GENERIC_ALL)
        violation("HcsOpenComputeSystem: access 0x%x", access);
    char *name = text_in(id, "a system's id");
    Turn *turn = turn_take(OPEN);
    HRESULT code = turn ? turn->code : !name || !system_find(name) ? SYSTEM_NOT_FOUND : S_OK;
    turn_free(turn);
    if (code < 0) {
        free(name);
        return code;
    }
    Handle *made = calloc(1, sizeof *made);
    made->id = name;
    made->next = handles;
    *system = handles = made;
    return code;
}

EXPORT HRESULT HcsOpenComputeSystem(const WCHAR16 *id, uint32_t access, void **system) {
    pthread_mutex_lock(&lock);
    HRESULT code = open_system(id, access, system);
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT void HcsCloseComputeSystem(void *system) {
    pthread_mutex_lock(&lock);
    Handle *handle = live_system(system, "HcsCloseComputeSystem");
    if (handle && handle->inside)
        violation("HcsCloseComputeSystem: under %d operations", handle->inside);
    if (handle)
        handle->closed = true;
    pthread_mutex_unlock(&lock);
}

/* --- Operations --- */

EXPORT void *HcsCreateOperation(void *context, void *callback) {
    pthread_mutex_lock(&lock);
    if (context || callback)
        violation("HcsCreateOperation: a callback, which nobody here calls");
    Turn *turn = turn_take(CREATE);
    Operation *made = NULL;
    if (!turn) {
        made = calloc(1, sizeof *made);
        made->next = operations;
        operations = made;
    }
    turn_free(turn);
    pthread_mutex_unlock(&lock);
    return made;
}

EXPORT void HcsCloseOperation(void *operation) {
    pthread_mutex_lock(&lock);
    Operation *one = live_operation(operation, "HcsCloseOperation");
    if (one && one->waiting)
        violation("HcsCloseOperation: under a wait");
    if (one)
        one->closed = true;
    pthread_mutex_unlock(&lock);
}

static void carry_out(Operation *one) {
    if (one->call == ENUMERATE) {
        one->code = systems_enumerate(one->document, &one->result);
        return;
    }
    System *system = system_find(one->system->id);
    one->code = one->call == MODIFY ? system_modify(system, one->document, &one->result)
                                    : system_properties(system, one->document, &one->result);
}

/* Wait until the test wants the end, and bring it about. */
static void *run(void *argument) {
    Operation *one = argument;
    pthread_mutex_lock(&lock);
    if (one->turn && one->turn->when == UNTIL_TOLD) {
        pending++;
        pthread_cond_broadcast(&change);
        while (!one->told)
            pthread_cond_wait(&change, &lock);
        pending--;
    } else if (one->turn && one->turn->when != LATE_WAITS && one->turn->milliseconds) {
        struct timespec end = after((uint32_t)one->turn->milliseconds);
        while (!one->told && pthread_cond_timedwait(&change, &lock, &end) != ETIMEDOUT)
            ;
    }
    if (one->turn && one->turn->code && one->turn->when != AFTERWARDS)
        one->code = one->turn->code;
    else
        carry_out(one);
    if (one->turn && one->turn->when == AFTERWARDS) /* done, and said to be otherwise */
        one->code = one->turn->code;
    if (one->turn && one->turn->document) {
        free(one->result);
        one->result = strdup(one->turn->document);
    }
    one->done = true;
    if (one->system)
        one->system->inside--;
    threads--;
    pthread_cond_broadcast(&change);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static HRESULT begin(Call call, const char *function, void *system, void *operation,
                     const WCHAR16 *document) {
    Operation *one = live_operation(operation, function);
    Handle *handle = call == ENUMERATE ? NULL : live_system(system, function);
    char *text = text_in(document, function);
    if (!one || (call != ENUMERATE && !handle) || !text) {
        free(text);
        return one ? INVALID_HANDLE : E_INVALIDARG;
    }
    if (one->begun || one->refused) {
        violation("%s: an operation for the second time", function);
        free(text);
        return ALREADY_STARTED;
    }
    one->call = call;
    one->document = text;
    one->turn = turn_take(call);
    if (call == MODIFY) {
        if (documents.length)
            text_add(&documents, "\n", 1);
        text_quoted(&documents, text);
    }
    if (one->turn && one->turn->when == AT_START) {
        one->refused = true;
        one->code = one->turn->code;
        one->result = one->turn->document ? strdup(one->turn->document) : NULL;
        return one->code;
    }
    pthread_t thread;
    one->begun = true;
    one->system = handle;
    if (handle)
        handle->inside++;
    threads++;
    if (pthread_create(&thread, NULL, run, one))
        abort();
    pthread_detach(thread);
    return S_OK;
}

EXPORT HRESULT HcsModifyComputeSystem(void *system, void *operation, const WCHAR16 *configuration,
                                      void *identity) {
    pthread_mutex_lock(&lock);
    if (identity)
        violation("HcsModifyComputeSystem: an identity: %p", identity);
    HRESULT code = begin(MODIFY, "HcsModifyComputeSystem", system, operation, configuration);
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT HRESULT HcsGetComputeSystemProperties(void *system, void *operation, const WCHAR16 *query) {
    pthread_mutex_lock(&lock);
    HRESULT code = begin(PROPERTIES, "HcsGetComputeSystemProperties", system, operation, query);
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT HRESULT HcsEnumerateComputeSystems(const WCHAR16 *query, void *operation) {
    pthread_mutex_lock(&lock);
    HRESULT code = begin(ENUMERATE, "HcsEnumerateComputeSystems", NULL, operation, query);
    pthread_mutex_unlock(&lock);
    return code;
}

static HRESULT hand_over(const Operation *one, WCHAR16 **result) {
    if (result)
        *result = one->result ? text_out(one->result) : NULL;
    return one->code;
}

EXPORT HRESULT HcsWaitForOperationResult(void *operation, uint32_t milliseconds, WCHAR16 **result) {
    pthread_mutex_lock(&lock);
    HRESULT code = E_INVALIDARG;
    Operation *one = live_operation(operation, "HcsWaitForOperationResult");
    if (result)
        *result = NULL;
    if (one && !one->begun) {
        violation("HcsWaitForOperationResult: of what was not begun");
        code = NOT_STARTED;
    } else if (one && one->turn && one->turn->when == LATE_WAITS && one->turn->milliseconds-- > 0) {
        code = TIMED_OUT;
    } else if (one) {
        struct timespec end = after(milliseconds == INFINITE ? 1000000 : milliseconds);
        one->waiting++;
        while (!one->done && pthread_cond_timedwait(&change, &lock, &end) != ETIMEDOUT)
            ;
        one->waiting--;
        code = one->done ? hand_over(one, result) : TIMED_OUT;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT HRESULT HcsGetOperationResult(void *operation, WCHAR16 **result) {
    pthread_mutex_lock(&lock);
    HRESULT code = E_INVALIDARG;
    Operation *one = live_operation(operation, "HcsGetOperationResult");
    if (result)
        *result = NULL;
    if (one && !one->begun && !one->refused)
        code = NOT_STARTED;
    else if (one)
        code = one->refused || one->done ? hand_over(one, result) : PENDING;
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT HRESULT HcsCancelOperation(void *operation) {
    (void)operation;
    return E_NOTIMPL; /* so the documentation */
}

/* --- Access --- */

/* For vmcompute.dll too, which is a library of its own. */
EXPORT HRESULT fake_access(int grants, const WCHAR16 *vm_id, const WCHAR16 *path) {
    pthread_mutex_lock(&lock);
    Turn *turn = turn_take(grants ? GRANT : REVOKE);
    HRESULT code = turn ? turn->code : access_change(grants, vm_id, path);
    turn_free(turn);
    pthread_mutex_unlock(&lock);
    return code;
}

#ifndef WITHOUT_ACCESS
EXPORT HRESULT HcsGrantVmAccess(const WCHAR16 *vm_id, const WCHAR16 *path) {
    return fake_access(1, vm_id, path);
}

EXPORT HRESULT HcsRevokeVmAccess(const WCHAR16 *vm_id, const WCHAR16 *path) {
    return fake_access(0, vm_id, path);
}
#endif

/* --- For the test --- */

/* Whether so many operations wait to be told, before the time is over. */
EXPORT int fake_wait_pending(int count, int milliseconds) {
    struct timespec end = after((uint32_t)milliseconds);
    pthread_mutex_lock(&lock);
    while (pending < count && pthread_cond_timedwait(&change, &lock, &end) != ETIMEDOUT)
        ;
    int enough = pending >= count;
    pthread_mutex_unlock(&lock);
    return enough;
}

static void finish(Operation *one, HRESULT code, const char *document) {
    one->told = true;
    one->turn->code = code;
    free(one->turn->document);
    one->turn->document = document ? strdup(document) : NULL;
}

/* The oldest operation that waits to be told ends: 0, and what it was to do is done. */
EXPORT void fake_finish(int32_t code, const char *document) {
    pthread_mutex_lock(&lock);
    Operation *oldest = NULL;
    for (Operation *one = operations; one; one = one->next)
        if (one->begun && !one->told && !one->done && one->turn && one->turn->when == UNTIL_TOLD)
            oldest = one;
    if (oldest)
        finish(oldest, code, document);
    else
        violation("fake_finish: nothing waits to be told");
    pthread_cond_broadcast(&change);
    pthread_mutex_unlock(&lock);
}

/* What is alive: systems, operations, strings, threads; see fake_counts in the test. */
EXPORT int fake_alive(int what) {
    pthread_mutex_lock(&lock);
    int count = what == 0   ? systems_open()
                : what == 1 ? operations_alive()
                : what == 2 ? strings_alive()
                            : threads;
    pthread_mutex_unlock(&lock);
    return count;
}

/* Forget everything, once the threads have ended. */
EXPORT void fake_reset(void) {
    pthread_mutex_lock(&lock);
    for (Operation *one = operations; one; one = one->next)
        if (one->begun && !one->done && one->turn)
            finish(one, E_FAIL, NULL);
    pthread_cond_broadcast(&change);
    while (threads)
        pthread_cond_wait(&change, &lock);
    while (operations) {
        Operation *one = operations;
        operations = one->next;
        free(one->document);
        free(one->result);
        turn_free(one->turn);
        free(one);
    }
    while (handles) {
        Handle *one = handles;
        handles = one->next;
        free(one->id);
        free(one);
    }
    turns_forget();
    systems_forget();
    strings_forget();
    text_clear(&documents);
    pthread_mutex_unlock(&lock);
}
